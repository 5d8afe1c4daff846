// @ts-check
/** Small drawings of figures. Each has its figures beside it in words. */

import { figure, svg } from "./dom.js";

const WIDTH = 320;
const HEIGHT = 140;
const MARGIN = { left: 38, right: 10, top: 10, bottom: 24 };

/**
 * A curve of points, its chosen point and the height that was aimed at.
 * @param {{x: number, y: number}[]} points ascending by x, which is drawn by its logarithm
 * @param {{x: number, y: number} | null} chosen
 * @param {number} aim
 * @param {string} label
 */
export function curve(points, chosen, aim, label) {
  const logs = points.map(({ x }) => Math.log2(x));
  const [left, right] = [Math.min(...logs), Math.max(...logs)];
  const low = Math.min(0, ...points.map(({ y }) => y));
  const high = Math.max(aim, ...points.map(({ y }) => y)) * 1.05 || 1;
  const across = (/** @type {number} */ x) => MARGIN.left + ((Math.log2(x) - left) / (right - left || 1)) * (WIDTH - MARGIN.left - MARGIN.right);
  const up = (/** @type {number} */ y) => HEIGHT - MARGIN.bottom - ((y - low) / (high - low)) * (HEIGHT - MARGIN.top - MARGIN.bottom);
  const path = points.map(({ x, y }, i) => `${i ? "L" : "M"}${across(x).toFixed(1)} ${up(y).toFixed(1)}`).join("");
  const ends = [points[0], points[points.length - 1]];
  return svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "chart", role: "img", "aria-label": label },
    svg("line", { class: "axis", x1: MARGIN.left, x2: WIDTH - MARGIN.right, y1: up(low), y2: up(low) }),
    svg("line", { class: "aim", x1: MARGIN.left, x2: WIDTH - MARGIN.right, y1: up(aim), y2: up(aim) }),
    svg("text", { x: MARGIN.left - 4, y: up(aim) + 4, "text-anchor": "end" }, figure(aim, 2)),
    svg("path", { class: "line", d: path }),
    points.map(({ x, y }) => svg("circle", { class: "dot", cx: across(x), cy: up(y), r: 2 })),
    chosen && svg("circle", { class: "chosen", cx: across(chosen.x), cy: up(chosen.y), r: 4.5 }),
    ends.map(({ x }, i) => svg("text", { x: across(x), y: HEIGHT - 6, "text-anchor": i ? "end" : "start" }, `× ${figure(x, 2)}`)));
}
