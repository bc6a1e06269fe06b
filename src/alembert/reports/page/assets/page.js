"use strict";
/* The page's parts, drawn from the report's JSON. */
(() => {
  const {svg, html, frame, path, mark, walkable, explorable, say, extent, atLeast, ramp, number, points, signed, times, money} = Charts;
  const report = JSON.parse(document.getElementById("report").textContent);
  const metric = report.task.metric.replaceAll("_", " ");
  const ONE_POINT = 0.01;
  const sum = values => values.reduce((total, value) => total + value, 0);
  const byId = id => document.getElementById(id);
  const baseline = report.candidates[0];
  const verdict = Math.max(0, report.models.findIndex(model => model.name === report.verdict.model));
  const state = {
    verdict, model: verdict,
    place: {}, price: report.price_per_hour, axis: "texts_per_second",
  };
  const model = () => report.models[state.model];
  const exits = () => model().exits;
  const place = () => state.place[state.model] ?? exits().speeds.indexOf(exits().default_speed);
  const certifiedSpeeds = () => model().calibration ? model().calibration.certified_speeds : [];
  const costPerMillion = rate => rate ? 1e6 / rate / 3600 * state.price : null;

  /* Theme. */
  const theme = byId("theme"), root = document.documentElement;
  const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const nameTheme = () => { theme.textContent = isDark() ? "Light" : "Dark"; theme.setAttribute("aria-label", `Switch to ${theme.textContent.toLowerCase()} colours`); };
  theme.hidden = false;
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("alembert-theme", root.dataset.theme); } catch { /* storage may be forbidden */ }
    nameTheme();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
  nameTheme();

  /* Candidates. */
  const AXES = {
    texts_per_second: {label: "texts per second, more is better →", better: 1, show: number},
    macs: {label: "← FLOPs per text, fewer are better", better: -1, show: value => number(2 * value), scale: 2},
    p50_ms: {label: "← median ms for one text, less is better", better: -1, show: value => number(value) + " ms"},
  };
  const BACKENDS = {onnxruntime: "ONNX Runtime", torch: "Alembert, torch", onnx: "Alembert, ONNX Runtime", outside: "outside program"};
  const engine = row => (BACKENDS[row.backend] || row.backend) + (row.precision ? ", " + row.precision : "");
  const groups = (() => {
    const found = new Map();
    for (const row of report.candidates) {
      const key = JSON.stringify([row.name, row.backend, row.precision, row.batching]);
      if (!found.has(key)) found.set(key, []);
      found.get(key).push(row);
    }
    const shapes = Charts.shapes.filter(shape => shape !== "star"), [first, ...others] = found.values();
    // The models themselves come before what else the first one was run by.
    others.sort((a, b) => (b[0].speed !== null) - (a[0].speed !== null) || (a[0].name === first[0].name) - (b[0].name === first[0].name));
    return [
      {rows: first, shape: "star", colour: "var(--ink)", name: `${first[0].name}: ${engine(first[0])} (baseline)`},
      ...others.map((rows, index) => ({
        // Seven rows of six: shape and colour together tell thirty-six groups apart.
        rows, shape: shapes[index % shapes.length], colour: `var(--c${(index + Math.floor(index / 6)) % 6})`, name: `${rows[0].name}: ${engine(rows[0])}`,
      })),
    ];
  })();

  function drawTrade() {
    const key = state.axis, axis = AXES[key], scale = axis.scale || 1;
    const known = report.candidates.filter(row => row[key] !== null);
    const values = known.map(row => row[key] * scale), [low, high] = extent(values);
    const holder = byId("trade-chart"), narrow = holder.clientWidth < 520;
    const chart = frame(holder, {
      height: narrow ? 320 : 400, title: `${metric} against ${axis.label.replace(/^← | →$/g, "")}`,
      x: {domain: [low / 1.18, high * 1.18], log: true, label: axis.label},
      y: {domain: atLeast(extent(known.map(row => row.metric), 0.12), ONE_POINT), scale: 100, label: metric},
      margin: {top: 26, left: narrow ? 40 : 48},
    });
    const {X, Y} = chart, x = row => X(row[key] * scale), marks = [];
    const front = known.filter(row => row.pareto[key]).sort((a, b) => x(a) - x(b));
    const steps = [], {area} = chart, more = axis.better > 0;
    if (front.length) steps.push(more ? [area.left, Y(front[0].metric)] : [x(front[0]), area.bottom]);
    front.forEach((row, index) => {
      if (index) steps.push(more ? [x(front[index - 1]), Y(row.metric)] : [x(row), Y(front[index - 1].metric)]);
      steps.push([x(row), Y(row.metric)]);
    });
    if (front.length) steps.push(more ? [x(front.at(-1)), area.bottom] : [area.right, Y(front.at(-1).metric)]);
    chart.root.append(svg("path", {class: "front-line", d: path(steps)}));
    chart.root.append(svg("line", {class: "reference", x1: chart.area.left, x2: chart.area.right, y1: Y(baseline.metric), y2: Y(baseline.metric)}));
    for (const group of groups) {
      const rows = group.rows.filter(row => row[key] !== null).sort((a, b) => (a.speed ?? 0) - (b.speed ?? 0));
      if (rows.length > 1) chart.root.append(svg("path", {d: path(rows.map(row => [x(row), Y(row.metric)])), fill: "none", stroke: group.colour, "stroke-width": 1.4}));
    }
    for (const group of groups) {
      for (const row of group.rows.filter(row => row[key] !== null)) {
        const on = row.pareto[key];
        const element = mark(group.shape, x(row), Y(row.metric), group.shape === "star" ? 9 : 6, {
          fill: on || group.shape === "star" ? group.colour : "var(--bg)", stroke: group.colour, "stroke-width": 2,
        });
        chart.root.append(element);
        marks.push({x: x(row), element, lines: candidateLines(row)});
      }
      const ends = group.rows.length > 1 ? [group.rows[0], group.rows[group.rows.length - 1]] : [];
      ends.forEach((row, end) => {
        if (row[key] === null) return;
        chart.root.append(svg("text", {x: x(row), y: Y(row.metric) + (end ? -13 : 24), "text-anchor": "middle", class: "halo"}, "speed " + row.speed));
      });
    }
    const leading = report.verdict.met && known.find(row => row.name === report.verdict.model && row.speed === report.verdict.speed && row.backend === (report.models[state.verdict].exported ? "onnx" : "torch"));
    if (leading) {
      chart.root.append(svg("circle", {cx: x(leading), cy: Y(leading.metric), r: 13, fill: "none", stroke: "var(--good)", "stroke-width": 2, "pointer-events": "none"}));
      chart.root.append(svg("text", {x: x(leading), y: Y(leading.metric) + 29, "text-anchor": "middle", class: "halo", style: "fill: var(--good); font-weight: 600"}, "verdict"));
    }
    explorable(chart.root, marks);
    byId("trade-legend").replaceChildren(...groups.map(group => html("li", {},
      svg("svg", {viewBox: "-9 -7 18 14", "aria-hidden": "true"}, mark(group.shape, 0, 0, 5.5, {fill: group.colour, stroke: group.colour})), group.name)));
  }

  function candidateLines(row) {
    const lines = [row.name, engine(row) + (row.speed === null ? "" : `, speed ${row.speed}`)];
    lines.push(`${metric} ${points(row.metric)} (${points(row.metric_interval[0])} to ${points(row.metric_interval[1])})`);
    if (row.texts_per_second !== null) lines.push(`${number(row.texts_per_second)} texts/s, ${times(row.ratio_to_baseline)} the baseline`);
    if (row.texts_per_second) lines.push(`${money(costPerMillion(row.texts_per_second))} per million texts`);
    if (row.macs !== null) lines.push(`${number(2 * row.macs)} FLOPs per text`);
    if (row.p50_ms !== null) lines.push(`one text: ${number(row.p50_ms)} ms (p95 ${number(row.p95_ms)})`);
    const on = Object.keys(AXES).filter(key => row.pareto[key]);
    if (on.length) lines.push("on the Pareto front by " + on.map(key => ({texts_per_second: "throughput", macs: "FLOPs", p50_ms: "latency"})[key]).join(", "));
    return lines;
  }

  for (const input of document.querySelectorAll("input[name=axis]")) {
    input.disabled = !report.candidates.some(row => row[input.value] !== null);
    input.addEventListener("change", () => { state.axis = input.value; drawTrade(); });
  }
  if (!report.candidates.some(row => row.texts_per_second !== null)) state.axis = "macs";

  /* The speed slider. */
  const exitColour = (index, count) => index === count - 1 ? "var(--full)" : ramp(count < 3 ? 0.5 : index / (count - 2));
  const exitName = (layer, index, count) => index === count - 1 ? "full model" : `layer ${layer}`;
  const shareText = share => share >= 0.0995 || share === 0 ? `${Math.round(100 * share)}%` : `${(100 * share).toFixed(1)}%`;

  function slide(index) {
    state.place[state.model] = Math.min(Math.max(index, 0), exits().speeds.length - 1);
    showSpeed();
  }

  function showSpeed() {
    const e = exits(), at = place(), curve = e.curve, speed = e.speeds[at];
    const slider = byId("slider");
    slider.max = e.speeds.length - 1;
    slider.value = at;
    byId("speed-value").textContent = String(speed);
    const [rate, ratio] = [e.texts_per_second, e.ratio_to_baseline].map(values => values ? values[at] : null), change = curve.metric[at] - curve.metric[0];
    slider.setAttribute("aria-valuetext", `speed ${speed}: ${metric} ${points(curve.metric[at])}` + (rate ? `, ${number(rate)} texts per second, ${money(costPerMillion(rate))} per million` : ""));
    byId("figure-metric").textContent = points(curve.metric[at]);
    byId("figure-metric-sub").textContent = `${signed(change)} against its full model; 95%: ${points(curve.low[at])} to ${points(curve.high[at])}`;
    byId("figure-rate").textContent = number(rate);
    const kind = e.measured_speeds.includes(speed) ? "measured" : e.measured_speeds.length > 1 ? "estimated" : "at best, by operations";
    byId("figure-rate-sub").textContent = rate === null ? "not measured" : `${kind}${ratio === null ? "" : `, ${times(ratio)} the baseline`}`;
    byId("figure-cost").textContent = money(costPerMillion(rate));
    byId("figure-macs").textContent = curve.speedup[at] === null ? "–" : times(curve.speedup[at]);
    byId("figure-macs-sub").textContent = curve.macs[at] === null ? "not counted" : `than its full model; ${number(2 * curve.macs[at])} FLOPs a text`;
    byId("figure-changed").textContent = shareText(curve.changed[at]);
    showStatus(speed);
    moveCursors(at);
    showBars(at);
  }

  function showStatus(speed) {
    const status = byId("speed-status"), calibration = model().calibration, certified = certifiedSpeeds().includes(speed);
    status.classList.toggle("certified", certified || speed === 0);
    const text = certified ? calibration.promise
      : speed === 0 ? "the full model itself"
      : !calibration || calibration.mode !== "certified" ? "no guarantee"
      : speed > Math.max(...certifiedSpeeds(), 0) ? "faster than certified: no guarantee" : "not among the speeds tested: no guarantee";
    // The same words set anew would be spoken anew.
    if (status.textContent !== text) status.textContent = text;
  }

  const cursors = [];
  function moveCursors(at) { for (const move of cursors) move(at); }

  function drawSpeed() {
    const e = exits(), curve = e.curve;
    cursors.length = 0;
    const known = curve.speedup.every(value => value !== null);
    const xs = known ? curve.speedup : e.speeds;
    const holder = byId("curve-chart");
    const [low, high] = extent(xs), room = Math.max((high / low) ** 0.02, 1.02);
    const scores = atLeast(extent([...curve.low, ...curve.high], 0.03), ONE_POINT);
    const chart = frame(holder, {
      height: 300, title: `${metric} along the speeds`, margin: {top: 26},
      x: known ? {domain: [low / room, high * room], log: true, label: "fewer operations than at speed 0 (log)", unit: "×", ticks: 5}
        : {domain: [0, 1], label: "speed"},
      y: {domain: scores, scale: 100, label: metric},
    });
    const at = index => [chart.X(xs[index]), chart.Y(curve.metric[index])], all = e.speeds.map((_, index) => index);
    const band = [...all.map(i => [chart.X(xs[i]), chart.Y(curve.high[i])]), ...all.slice().reverse().map(i => [chart.X(xs[i]), chart.Y(curve.low[i])])];
    chart.root.append(svg("path", {d: path(band) + "Z", fill: "var(--band)"}));
    chart.root.append(svg("line", {class: "reference", x1: chart.area.left, x2: chart.area.right, y1: chart.Y(curve.metric[0]), y2: chart.Y(curve.metric[0])}));
    chart.root.append(svg("path", {d: path(all.map(at)), fill: "none", stroke: "var(--accent)", "stroke-width": 2}));
    // Dots, not a line: speeds between those that were tested are not vouched for.
    const safe = all.filter(i => certifiedSpeeds().includes(e.speeds[i])).map(at);
    for (const [cx, cy] of safe) chart.root.append(svg("circle", {class: "certified", cx, cy, r: 3, fill: "var(--good)"}));
    if (safe.length) chart.root.append(svg("text", {x: safe.at(-1)[0] + 9, y: safe.at(-1)[1] - 9, class: "halo", style: "fill: var(--good)"}, "certified"));
    const dot = svg("circle", {r: 7, fill: "var(--bg)", stroke: "var(--ink)", "stroke-width": 3, "pointer-events": "none"});
    chart.root.append(dot);
    cursors.push(index => { const [x, y] = at(index); dot.setAttribute("cx", x); dot.setAttribute("cy", y); });
    nearest(chart, all.map(at), index => [`speed ${e.speeds[index]}`, `${metric} ${points(curve.metric[index])}`, known ? `${times(curve.speedup[index])} fewer operations` : ""]);
    drawShares(e);
    const origin = e.default_from === "calibrated" ? model().calibration.mode : e.default_from;
    byId("to-default").textContent = ({own: "own setting", picked: "picked here"}[origin] || origin) + ` (${e.default_speed})`;
    const defaultPlace = e.speeds.indexOf(e.default_speed), share = defaultPlace / (e.speeds.length - 1), label = byId("default-mark");
    label.hidden = false;
    label.style.left = `calc(${100 * share}% + ${(8 - 16 * share).toFixed(1)}px)`;
    label.textContent = origin;
    label.classList.toggle("certified", origin === "certified");
    byId("exit-legend").replaceChildren(...e.layers.map((layer, index) => html("li", {},
      html("i", {class: "swatch", style: `background: ${exitColour(index, e.layers.length)}`}), exitName(layer, index, e.layers.length))));
    makeBars(e);
  }

  /* Choosing a speed in a chart: the mark nearest to the pointer is what a click takes; arrow keys move as the slider's do. */
  function nearest(chart, spots, describe) {
    const find = event => {
      const box = chart.root.getBoundingClientRect(), ratio = chart.width / box.width;
      const x = (event.clientX - box.left) * ratio, y = (event.clientY - box.top) * ratio;
      let best = 0, least = Infinity;
      spots.forEach(([sx, sy], index) => { const far = (sx - x) ** 2 + (sy === null ? 0 : (sy - y) ** 2); if (far < least) { least = far; best = index; } });
      return best;
    };
    chart.root.style.cursor = "pointer";
    chart.root.addEventListener("pointermove", event => {
      if (event.buttons & 1) slide(find(event));
      Charts.showTip(describe(find(event)).filter(Boolean), {left: event.clientX, width: 0, top: event.clientY - 6, bottom: event.clientY + 6});
    });
    chart.root.addEventListener("pointerleave", Charts.hideTip);
    chart.root.addEventListener("click", event => slide(find(event)));
    walkable(chart.root, "Arrow keys go from speed to speed.");
    chart.root.addEventListener("keydown", event => {
      const to = {ArrowRight: place() + 1, ArrowUp: place() + 1, ArrowLeft: place() - 1, ArrowDown: place() - 1, Home: 0, End: spots.length - 1}[event.key];
      if (event.key === "Escape") Charts.hideTip();
      if (to === undefined) return;
      event.preventDefault();
      slide(to);
      const box = chart.root.getBoundingClientRect(), ratio = box.width / chart.width, [x, y] = spots[place()], lines = describe(place()).filter(Boolean);
      say(lines);
      Charts.showTip(lines, {left: box.left + x * ratio, width: 0, top: box.top + (y ?? chart.area.top) * ratio - 6, bottom: box.top + (y ?? chart.area.bottom) * ratio + 6});
    });
  }

  function drawShares(e) {
    const chart = frame(byId("shares-chart"), {
      height: 300, title: "share of texts by exit and speed", margin: {top: 26},
      x: {domain: [0, 1], label: "speed", ticks: 5}, y: {domain: [0, 1], scale: 100, unit: "%", ticks: 4, label: "share of texts"},
    });
    const rows = report.task.rows, bottoms = e.speeds.map(() => 0);
    e.layers.forEach((layer, index) => {
      const tops = e.speeds.map((_, k) => bottoms[k] + e.curve.counts[k][index] / rows);
      const outline = [...e.speeds.map((speed, k) => [chart.X(speed), chart.Y(tops[k])]), ...e.speeds.map((speed, k) => [chart.X(speed), chart.Y(bottoms[k])]).reverse()];
      chart.root.append(svg("path", {d: path(outline) + "Z", fill: exitColour(index, e.layers.length)}));
      tops.forEach((top, k) => { bottoms[k] = top; });
    });
    const line = svg("line", {class: "cursor", y1: chart.area.top, y2: chart.area.bottom, "pointer-events": "none"});
    chart.root.append(line);
    cursors.push(index => { const x = chart.X(e.speeds[index]); line.setAttribute("x1", x); line.setAttribute("x2", x); });
    nearest(chart, e.speeds.map(speed => [chart.X(speed), null]), index => [`speed ${e.speeds[index]}`,
      ...e.layers.map((layer, k) => e.curve.counts[index][k] ? `${exitName(layer, k, e.layers.length)}: ${shareText(e.curve.counts[index][k] / rows)}` : "")]);
  }

  let bars = [];
  function makeBars(e) {
    const rows = [{name: "all texts", rows: report.task.rows, counts: at => e.curve.counts[at], right: null, all: true}];
    (e.classes ? e.classes.labels : []).forEach((name, index) => rows.push({
      name, rows: e.classes.rows[index], counts: at => e.classes.counts[at][index], right: at => e.classes.right[at][index],
    }));
    bars = rows.map(row => {
      const name = html("span", {class: "name" + (row.all ? " all" : ""), title: row.name}, row.name);
      const bar = html("div", {class: "bar", role: "img"}), value = html("span", {class: "value"});
      const parts = e.layers.map((layer, index) => html("span", {style: `background: ${exitColour(index, e.layers.length)}`}));
      bar.append(...parts);
      return {row, name, bar, parts, value, layers: e.layers};
    });
    byId("exit-bars").replaceChildren(...bars.map(one => html("div", {class: "row"}, one.name, one.bar, one.value)));
  }
  function showBars(at) {
    for (const {row, bar, parts, value, layers} of bars) {
      const counts = row.counts(at), described = [];
      counts.forEach((count, index) => {
        const share = row.rows ? count / row.rows : 0;
        parts[index].style.width = `${100 * share}%`;
        parts[index].title = `${exitName(layers[index], index, layers.length)}: ${shareText(share)} (${count} of ${row.rows})`;
        if (count) described.push(parts[index].title);
      });
      bar.setAttribute("aria-label", `${row.name}: ${described.join("; ")}`);
      const early = row.rows ? 1 - counts.at(-1) / row.rows : 0;
      value.textContent = row.right ? `${points(row.right(at) / row.rows)}% right` : `${shareText(early)} leave early`;
    }
  }

  /* Exits: uncertainties, reliability. */
  function drawUncertainty() {
    const e = exits(), {edges, right, wrong} = e.uncertainty, holder = byId("uncertainty");
    holder.replaceChildren();
    const tops = right.map((counts, index) => Math.max(...counts.map((count, bin) => count + wrong[index][bin])));
    const middle = counts => { let left = sum(counts) / 2; return edges[1 + counts.findIndex(count => (left -= count) <= 0)]; };
    right.forEach((counts, index) => {
      const box = html("div"), title = html("div", {class: "dim"});
      holder.append(html("div", {}, title, box));
      const rows = report.task.rows;
      const chart = frame(box, {
        height: 118, margin: {left: 30, bottom: 20, right: 4, top: 6},
        x: {domain: [0, 1], values: [0, 0.5, 1]}, y: {domain: [0, tops[index] / rows], ticks: 2, scale: 100, unit: "%"},
      });
      counts.forEach((count, bin) => {
        const x = chart.X(edges[bin]) + 0.5, width = chart.X(edges[bin + 1]) - chart.X(edges[bin]) - 1, other = wrong[index][bin];
        const high = chart.Y(count / rows), higher = chart.Y((count + other) / rows);
        chart.root.append(svg("rect", {x, width, y: high, height: chart.area.bottom - high, fill: "var(--right)"}));
        chart.root.append(svg("rect", {x, width, y: higher, height: high - higher, fill: "var(--wrong)"}));
      });
      const halves = [["right", counts], ["wrong", wrong[index]]].filter(([, some]) => sum(some)).map(([kind, some]) => `half of what is ${kind} up to ${number(middle(some))}`);
      const described = `uncertainty at layer ${e.layers[index]}: ${points(sum(counts) / rows)}% right; ${halves.join(", ")}`;
      const line = svg("line", {class: "cursor", y1: chart.area.top - 4, y2: chart.area.bottom});
      chart.root.append(line);
      cursors.push(at => {
        const x = chart.X(e.speeds[at]), below = e.curve.counts[at][index];
        line.setAttribute("x1", x); line.setAttribute("x2", x);
        chart.root.setAttribute("aria-label", `${described}; ${shareText(below / rows)} of texts leave here at speed ${e.speeds[at]}`);
        title.replaceChildren(html("b", {class: "strong", style: "color: var(--ink)"}, `layer ${e.layers[index]}`), ` ${shareText(below / rows)} of texts leave here`);
      });
    });
  }

  function drawReliability() {
    const holder = byId("reliability"), lowest = model().reliability.flatMap(exit => exit.bins.map(bin => Math.min(bin.accuracy, bin.confidence)));
    const from = Math.min(0.9, Math.max(0, Math.floor(10 * Math.min(...lowest)) / 10));
    holder.replaceChildren();
    model().reliability.forEach((exit, index) => {
      const box = html("div"), name = exitName(exit.layer, index, model().reliability.length), ece = `ECE ${exit.expected_calibration_error.toFixed(3)}`;
      const rows = sum(exit.bins.map(bin => bin.rows)), mean = key => points(sum(exit.bins.map(bin => bin.rows * bin[key])) / rows);
      holder.append(html("div", {}, html("div", {class: "dim"}, html("b", {style: "color: var(--ink)"}, name), " " + ece), box));
      const chart = frame(box, {
        height: 140, title: `accuracy by confidence after ${name}: ${mean("accuracy")}% right, ${mean("confidence")}% sure on average, ${ece}`, margin: {left: 30, bottom: 20, right: 8, top: 8},
        x: {domain: [from, 1], values: [from, (from + 1) / 2, 1], scale: 100}, y: {domain: [from, 1], values: [from, (from + 1) / 2, 1], scale: 100},
      });
      chart.root.append(svg("line", {class: "reference", x1: chart.X(from), y1: chart.Y(from), x2: chart.X(1), y2: chart.Y(1)}));
      const spots = exit.bins.map(bin => [chart.X(bin.confidence), chart.Y(bin.accuracy)]);
      const solid = spots.filter((_, k) => exit.bins[k].rows >= Math.max(5, rows / 100));
      chart.root.append(svg("path", {d: path(solid), fill: "none", stroke: "var(--accent)", "stroke-width": 1}));
      const marks = exit.bins.map((bin, k) => {
        const element = svg("circle", {cx: spots[k][0], cy: spots[k][1], r: 1.5 + 7 * Math.sqrt(bin.rows / rows), fill: "var(--accent)", "fill-opacity": 0.75, stroke: "var(--bg)"});
        chart.root.append(element);
        return {x: spots[k][0], element, lines: [name, `confidence ${points(bin.confidence)}%`, `right ${points(bin.accuracy)}%`, `${bin.rows.toLocaleString("en-US")} answers`]};
      });
      explorable(chart.root, marks);
    });
  }

  /* Training and transport. */
  function drawTraining(holder) {
    const stages = report.models[Number(holder.dataset.training)].run.training;
    holder.replaceChildren();
    for (const stage of stages) {
      holder.append(html("h4", {}, `${stage.name}: ${stage.steps.toLocaleString("en-US")} steps`));
      const series = Object.entries(stage.terms).map(([name, one]) => ({name, ...one}));
      if (stage.score) series.push({name: "score on dev", ...stage.score, points: true});
      for (const one of series) drawSeries(holder, one);
    }
  }
  function drawSeries(holder, one) {
    const spots = one.steps.map((step, index) => [step, one.values[index]]).filter(([, value]) => value !== null);
    if (!spots.length) return;
    const box = html("div");
    holder.append(html("div", {}, html("div", {class: "dim"}, html("b", {style: "color: var(--ink)"}, one.name), ` ${number(spots.at(-1)[1])} at the end`), box));
    const values = spots.map(([, value]) => value), [low, high] = extent(values);
    const told = ([step, value]) => `${number(value)} at step ${step.toLocaleString("en-US")}`;
    const course = spots.length < 2 ? told(spots[0]) : `${told(spots[0])}, ${told(spots.at(-1))}, between ${number(low)} and ${number(high)}`;
    const chart = frame(box, {
      height: 130, title: `${one.name} by step: ${course}`, margin: {left: 38, bottom: 20, right: 10, top: 8},
      x: {domain: [0, Math.max(spots.at(-1)[0], 1)], ticks: 3}, y: {domain: low === high ? [low - 0.5, high + 0.5] : extent(values, 0.06), ticks: 3},
    });
    const line = spots.map(([step, value]) => [chart.X(step), chart.Y(value)]);
    chart.root.append(svg("path", {d: path(line), fill: "none", stroke: one.points ? "var(--c1)" : "var(--accent)", "stroke-width": 1.6}));
    const lines = spots.map(([step, value]) => [one.name, `step ${step.toLocaleString("en-US")}: ${number(value)}`]);
    const marks = line.map(([x, y], index) => {
      const element = svg("circle", {class: one.points || line.length < 3 ? null : "quiet", cx: x, cy: y, r: 3, fill: one.points ? "var(--c1)" : "var(--accent)", "pointer-events": "none"});
      chart.root.append(element);
      return {x, element, lines: lines[index]};
    });
    explorable(chart.root, marks);
    chart.root.addEventListener("pointermove", event => {
      const frameBox = chart.root.getBoundingClientRect(), x = (event.clientX - frameBox.left) * chart.width / frameBox.width;
      const best = line.reduce((found, [px], index) => Math.abs(px - x) < Math.abs(line[found][0] - x) ? index : found, 0);
      Charts.showTip(lines[best], {left: event.clientX, width: 0, top: event.clientY - 6, bottom: event.clientY + 6});
    });
    chart.root.addEventListener("pointerleave", Charts.hideTip);
  }

  function drawTransport(holder) {
    const [index, run] = holder.dataset.transport.split(",").map(Number);
    const part = report.models[index].run.transport[run], input = holder.querySelector("input"), output = holder.querySelector("output");
    const maps = holder.querySelector(".maps");
    const draw = () => {
      const at = Number(input.value);
      output.textContent = part.steps[at].toLocaleString("en-US");
      input.setAttribute("aria-valuetext", `step ${part.steps[at]}`);
      // All boxes first: what they measure depends on how many there are.
      const boxes = Object.keys(part.kinds).map(() => html("div"));
      maps.replaceChildren(...Object.keys(part.kinds).map((kind, k) =>
        html("figure", {}, html("figcaption", {}, kind === "hidden" ? "hidden states" : kind), boxes[k])));
      Object.entries(part.kinds).forEach(([kind, one], k) => drawFlow(boxes[k], one.flows[at], one.student_weights[at], one.teacher_weights[at], kind));
    };
    holder.redraw = draw;
    input.addEventListener("input", draw);
    draw();
  }
  function drawFlow(box, flow, students, teachers, kind) {
    const width = Math.max(240, box.clientWidth), left = 58, cell = (width - left - 44) / teachers.length, high = Math.max(26, Math.min(44, cell)), top = 30;
    const height = top + high * students.length + 40;
    const rootElement = svg("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `flow of ${kind} from student to teacher layers`});
    const most = Math.max(...flow.flat()), marks = [];
    rootElement.append(svg("text", {x: left, y: 11, class: "strong"}, "teacher layer →"), svg("text", {x: 0, y: 26}, "student ↓"));
    const heaviest = Math.max(...students, ...teachers);
    teachers.forEach((weight, t) => {
      const x = left + t * cell;
      rootElement.append(svg("text", {x: x + cell / 2, y: 26, "text-anchor": "middle"}, String(t + 1)));
      const tall = 30 * weight / heaviest, y = top + high * students.length + 6;
      rootElement.append(svg("rect", {x: x + 2, y, width: cell - 4, height: tall, fill: "var(--c1)"}, svg("title", {}, `teacher layer ${t + 1}: weight ${points(weight)}%`)));
    });
    students.forEach((weight, s) => {
      const y = top + s * high;
      rootElement.append(svg("text", {x: left - 8, y: y + high / 2 + 4, "text-anchor": "end"}, String(s + 1)));
      rootElement.append(svg("rect", {x: left + cell * teachers.length + 6, y: y + 2, width: 34 * weight / heaviest, height: high - 4, fill: "var(--c1)"}, svg("title", {}, `student layer ${s + 1}: weight ${points(weight)}%`)));
      flow[s].forEach((share, t) => {
        const x = left + t * cell;
        // No darker than lets the number be read in either theme.
        const element = svg("rect", {x: x + 0.5, y: y + 0.5, width: cell - 1, height: high - 1, rx: 3, fill: "var(--accent)", "fill-opacity": (0.55 * share / most).toFixed(3), stroke: "var(--line)"});
        rootElement.append(element);
        marks.push({x: s * 1000 + x, element, lines: [`student ${s + 1} → teacher ${t + 1}`, `${points(share)}% of the flow`]});
        if (share >= 0.005 && cell >= 17) rootElement.append(svg("text", {x: x + cell / 2, y: y + high / 2 + 4, "text-anchor": "middle", "pointer-events": "none", style: "fill: var(--ink); font-size: 10px"}, points(share, 0)));
      });
    });
    box.replaceChildren(rootElement);
    explorable(rootElement, marks);
  }

  /* One model in detail. */
  function showModel() {
    for (const element of document.querySelectorAll("[data-model]")) element.hidden = Number(element.dataset.model) !== state.model;
    for (const element of document.querySelectorAll("[data-needs]")) element.hidden = !model()[element.dataset.needs];
    for (const element of document.querySelectorAll("[data-lacks]")) element.hidden = Boolean(model()[element.dataset.lacks]);
    drawModel();
  }
  function drawModel() {
    cursors.length = 0;
    if (exits()) { drawSpeed(); drawUncertainty(); }
    if (model().reliability) drawReliability();
    if (exits()) showSpeed();
  }

  const picker = byId("model");
  if (picker) {
    picker.value = String(state.model);
    picker.addEventListener("change", () => { state.model = Number(picker.value); showModel(); });
  }
  if (byId("slider")) {
    byId("slider").addEventListener("input", event => slide(Number(event.target.value)));
    byId("to-default").addEventListener("click", () => slide(exits().speeds.indexOf(exits().default_speed)));
    byId("to-full").addEventListener("click", () => slide(0));
  }
  byId("price").addEventListener("input", event => {
    const given = Number.parseFloat(event.target.value);
    if (!(given >= 0)) return;
    state.price = given;
    for (const cell of document.querySelectorAll("[data-rate]")) cell.textContent = money(costPerMillion(Number.parseFloat(cell.dataset.rate)));
    for (const cell of document.querySelectorAll("[data-price]")) cell.textContent = String(given);
    drawTrade();
    if (exits()) showSpeed();
  });
  function drawAll() {
    drawTrade();
    drawModel();
    for (const holder of document.querySelectorAll("[data-training]")) if (holder.closest("details").open) drawTraining(holder);
    for (const holder of document.querySelectorAll("[data-transport]")) holder.redraw ? holder.redraw() : drawTransport(holder);
  }
  for (const holder of document.querySelectorAll("[data-training]")) {
    holder.closest("details").addEventListener("toggle", event => { if (event.target.open) drawTraining(holder); });
  }
  showModel();
  drawAll();
  let width = document.documentElement.clientWidth, waiting = 0;
  addEventListener("resize", () => {
    if (document.documentElement.clientWidth === width) return;
    width = document.documentElement.clientWidth;
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(drawAll);
  });
})();
