"use strict";
const by = id => document.getElementById(id);
const make = (tag, more = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), more);
  node.append(...children);
  return node;
};
let said;
function say(text) {  // to a screen reader, and at the foot of the window for a while
  by("said").textContent = text;
  clearTimeout(said);
  said = setTimeout(() => { by("said").textContent = ""; }, 4000);
}

by("scheme").addEventListener("click", () => {
  const root = document.documentElement.style;
  const now = root.colorScheme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  root.colorScheme = now === "dark" ? "light" : "dark";
});

function copy(text, done) {
  const old = () => {  // a page opened from a file may have no clipboard
    const area = make("textarea", { value: text });
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    return copied ? Promise.resolve() : Promise.reject();
  };
  (navigator.clipboard ? navigator.clipboard.writeText(text).catch(old) : old()).then(() => say(done), () => say("The browser did not allow copying."));
}

document.addEventListener("click", event => {
  const button = event.target.closest("[data-copy]");
  if (button) copy(button.dataset.copy, button.dataset.done || "Copied.");
});

function reach() {  // what can be scrolled sideways, by keys too
  for (const box of document.querySelectorAll(".wide"))
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
}
addEventListener("resize", reach);
reach();
