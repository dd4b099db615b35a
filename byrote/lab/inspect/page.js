document.addEventListener("mouseover", event => show(event.target.closest(".token")));

// With the keyboard: a text takes the focus, and arrows go from token to token.
function readable(text, name) {
  text.tabIndex = 0;
  text.setAttribute("role", "group");
  text.ariaLabel = name + ": arrow keys go from token to token";
  text.onkeydown = event => {
    const tokens = [...text.querySelectorAll(".token")], here = tokens.findIndex(each => each.matches(".here"));
    const next = {ArrowRight: here + 1, ArrowDown: here + 1, ArrowLeft: here - 1, ArrowUp: here - 1,
                  Home: 0, End: tokens.length - 1}[event.key];
    if (next === undefined) return;
    event.preventDefault();
    const target = tokens[Math.min(tokens.length - 1, Math.max(0, next))];
    target.scrollIntoView({block: "nearest"});
    show(target);
  };
  text.onblur = () => show(null);
}

