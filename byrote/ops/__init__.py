"""What a layer does between its projections: functions with a written backward, and compiled loops."""
