"""How the page looks, and the few lines that let two pictures flicker and one grow."""

from __future__ import annotations

__all__ = ["SCRIPT", "STYLE"]

STYLE = """
:root { color-scheme: light dark; --ink: #1b2430; --paper: #ffffff; --line: #d6dbe1; --soft: #5b6775;
  --good: #15803d; --check: #b45309; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --paper: #12171e; --line: #323c48; --soft: #9aa7b6;
  --good: #4ade80; --check: #fbbf24; --bad: #f87171; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 0.9rem; font-weight: 600; color: var(--soft); margin: 1rem 0 0.3rem; }
p { max-width: 46rem; margin: 0.5rem 0; }
.verdict { border: 1px solid var(--line); border-left: 6px solid var(--state); border-radius: 6px;
  padding: 0.6rem 1rem; }
.verdict.good { --state: var(--good); } .verdict.check { --state: var(--check); } .verdict.bad { --state: var(--bad); }
.headline { font-size: 1.15rem; font-weight: 600; }
.verdict ul { margin: 0.5rem 0; padding-left: 1.2rem; max-width: 46rem; }
.views { display: grid; gap: 0.3rem 1.5rem; }
.views.narrow { grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }
.row { display: grid; gap: 0.6rem; grid-template-columns: repeat(var(--n), minmax(0, 22rem)); }
@media (max-width: 40rem) { main { padding: 0.5rem; }
  .row { gap: 0.25rem; grid-template-columns: repeat(var(--m), minmax(0, 1fr)); } }
details { margin: 0.8rem 0; } summary { cursor: pointer; }
.views img { cursor: zoom-in; }
dialog { padding: 0; border: 0; max-width: 100vw; max-height: 100vh; background: #000; cursor: zoom-out; }
dialog img { width: max(56rem, min(96vw, 94vh)); border-radius: 0; }
.swatch { display: inline-block; width: 1.2rem; height: 0.3rem; vertical-align: middle; border-radius: 2px; }
figure { margin: 0; position: relative; }
img { display: block; width: 100%; height: auto; border-radius: 4px; }
figcaption { font-size: 0.85rem; color: var(--soft); }
.flicker .over { position: absolute; inset: 0 0 auto 0; visibility: hidden; }
.flicker.second .over { visibility: visible; }
button { font: inherit; padding: 0.3rem 0.9rem; border: 1px solid var(--soft); border-radius: 6px; background: none;
  color: inherit; cursor: pointer; }
button[aria-pressed=true] { background: var(--ink); color: var(--paper); }
.chart { max-width: 46rem; background: #fff; padding: 0.3rem; border: 1px solid var(--line); }
.scale { height: 0.9rem; max-width: 30rem; border-radius: 4px; }
.ticks { display: flex; justify-content: space-between; max-width: 30rem; font-size: 0.85rem; color: var(--soft); }
table { border-collapse: collapse; font-size: 0.95rem; font-variant-numeric: tabular-nums; max-width: 100%; }
th, td { text-align: left; padding: 0.25rem 0.8rem 0.25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th[scope=row] { font-weight: 400; color: var(--soft); }
.metrics td, .metrics th[scope=col] { text-align: right; }
.metrics td:last-child { font-weight: 600; }
@media print { #flick { display: none; } section { break-inside: avoid-page; } }
"""

SCRIPT = """
const button = document.getElementById("flick"), pairs = document.querySelectorAll(".flicker");
let timer = null;
function turn() {
  for (const pair of pairs) {
    const second = pair.classList.toggle("second");
    pair.querySelector("span").textContent = second ? "refined" : "fixed";
  }
}
function flick(on) {
  clearInterval(timer);
  timer = on ? setInterval(turn, 700) : null;
  button.setAttribute("aria-pressed", String(on));
}
button.addEventListener("click", () => flick(timer === null));
for (const pair of pairs) pair.addEventListener("click", () => { flick(false); turn(); });
const shown = document.createElement("dialog"), large = document.createElement("img");
shown.append(large);
document.body.append(shown);
function enlarge(picture) {
  large.src = picture.src;
  large.alt = picture.alt;
  shown.showModal();
}
for (const picture of document.querySelectorAll(".views img")) {
  picture.tabIndex = 0;
  picture.addEventListener("click", () => enlarge(picture));
  picture.addEventListener("keydown", (event) => { if (event.key === "Enter") enlarge(picture); });
}
shown.addEventListener("click", () => shown.close());
flick(!matchMedia("(prefers-reduced-motion: reduce)").matches);
"""
