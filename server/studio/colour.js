// @ts-check
/** By which feature the tokens of all answers are coloured. */

import { byId, figure, fill, h } from "./dom.js";
import { known, recall, showName } from "./known.js";
import { changes, colourBy, openFeature, served, setup } from "./state.js";

export function start() {
  byId("colour-sae").addEventListener("change", () => colourBy(byId("colour-sae").value, null));
  byId("colour-feature").addEventListener("change", () => {
    const feature = Number.parseInt(byId("colour-feature").value, 10);
    colourBy(setup.colour.sae ?? served.saes[0]?.id ?? "", Number.isNaN(feature) || feature < 0 ? null : feature);
  });
  byId("colour-name").addEventListener("click", () => {
    const { sae, feature } = setup.colour;
    if (sae !== null && feature !== null) openFeature(sae, feature);
  });
  changes.addEventListener("colour", draw);
  changes.addEventListener("served", () => {
    fill(byId("colour-sae"), ...served.saes.map(({ id }) => h("option", { value: id }, id)));
    byId("colour-sae-field").hidden = served.saes.length < 2;
    byId("colour").hidden = served.saes.length === 0;
    if (!served.saes.some(({ id }) => id === setup.colour.sae)) colourBy(served.saes[0]?.id ?? null, null);
    draw();
  });
}

function draw() {
  const { sae, feature } = setup.colour;
  byId("colour-sae").value = sae ?? "";
  byId("colour-feature").value = feature ?? "";
  const name = byId("colour-name");
  name.disabled = feature === null;
  byId("legend").hidden = feature === null;
  if (sae === null || feature === null) {
    name.textContent = "no feature yet";
    return;
  }
  showName(name, sae, feature);
  const scale = () => { byId("legend-most").textContent = figure(recall(sae, feature)?.max_activation); };
  scale();
  known(sae, feature).then(scale, () => {});
}
