"use strict";
const points = JSON.parse(document.getElementById("points").textContent);
const slider = document.getElementById("slider");
const percent = (share) => (share === null ? "none" : `${Math.round(100 * share)}%`);
function show() {
  const point = points[slider.value];
  document.getElementById("chosen").textContent = point.threshold.toFixed(2);
  document.getElementById("consequence").textContent =
    `Flags ${percent(point.flagged)} of the answers. Of the flagged ${percent(point.precision)} ` +
    `are wrong; of the wrong ${percent(point.recall)} are flagged.`;
}
slider.addEventListener("input", show);
document.getElementById("chooser").hidden = false;
show();
