const area = by("area"), tip = by("tip"), front = area.querySelector(".front");
const dots = [...area.querySelectorAll(".dot")];  // from left to right

function tell(dot) {
  const words = dot.getAttribute("aria-label");
  tip.replaceChildren(make("b", { textContent: dot.dataset.name }), words.slice(words.indexOf(": ") + 2), make("code", { textContent: dot.dataset.copy }));
  tip.hidden = false;
  const box = area.getBoundingClientRect(), at = dot.getBoundingClientRect();
  const x = at.left + at.width / 2 - box.left, y = at.top + at.height / 2 - box.top, gap = 18;
  tip.style.left = `${Math.min(Math.max(x - tip.offsetWidth / 2, 0), box.width - tip.offsetWidth)}px`;
  tip.style.top = `${y > tip.offsetHeight + gap ? y - tip.offsetHeight - gap : y + gap}px`;
}

function reachable() {  // one stop of the Tab key for all points; arrows go from one to the next
  const shown = dots.filter(dot => !dot.hidden);
  if (!shown.some(dot => dot.tabIndex === 0) && shown.length) shown[0].tabIndex = 0;
}

for (const dot of dots) {
  dot.addEventListener("pointerenter", () => tell(dot));
  dot.addEventListener("pointerleave", () => { tip.hidden = true; });
  dot.addEventListener("focus", () => tell(dot));
  dot.addEventListener("blur", () => { tip.hidden = true; });
}

area.addEventListener("keydown", event => {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const shown = dots.filter(dot => !dot.hidden), now = shown.indexOf(document.activeElement);
  const next = event.key === "Home" ? 0 : event.key === "End" ? shown.length - 1 : step && Math.min(Math.max(now + step, 0), shown.length - 1);
  if (event.key === "Escape") tip.hidden = true;
  if (now < 0 || next === undefined) return;
  event.preventDefault();
  shown[now].tabIndex = -1;
  shown[next].tabIndex = 0;
  shown[next].focus();
});

by("choose").addEventListener("input", () => {
  const chosen = new FormData(by("choose")), half = chosen.get("half"), methods = chosen.getAll("method");
  for (const dot of dots) {
    dot.hidden = !methods.includes(dot.dataset.method) || dot.dataset[half] === undefined;
    if (dot.hidden) dot.tabIndex = -1;
    else dot.style.bottom = `${dot.dataset[half]}%`;
  }
  front.style.display = half === "searched" ? "" : "none";
  reachable();
});
