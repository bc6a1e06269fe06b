"use strict";
/* Drawing: SVG elements, scales, axes, marks, details at a point. Text goes in as text nodes, never as markup. */
const Charts = (() => {
  const NS = "http://www.w3.org/2000/svg";

  function fill(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
    }
    for (const child of children) if (child !== null && child !== undefined) element.append(child);
    return element;
  }
  const svg = (tag, attributes, ...children) => fill(document.createElementNS(NS, tag), attributes, children);
  const html = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);

  /* Scales: value to position. */
  function linear(domain, range) {
    const [low, high] = domain, span = high - low || 1;
    const scale = value => range[0] + (value - low) / span * (range[1] - range[0]);
    scale.ticks = count => linearTicks(low, high, count);
    return scale;
  }
  function logarithmic(domain, range) {
    const inner = linear(domain.map(Math.log10), range);
    const scale = value => inner(Math.log10(value));
    scale.ticks = count => {
      const found = [];
      for (let power = Math.floor(Math.log10(domain[0])); power <= Math.ceil(Math.log10(domain[1])); power++) {
        for (const digit of [1, 2, 5]) {
          const value = digit * 10 ** power;
          if (value >= domain[0] && value <= domain[1]) found.push(value);
        }
      }
      return found.length >= 3 ? found : linearTicks(domain[0], domain[1], count);
    };
    return scale;
  }
  function linearTicks(low, high, count) {
    const raw = (high - low) / Math.max(1, count) || 1;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map(digit => digit * power).find(value => value >= raw * 0.999);
    const found = [];
    for (let place = Math.ceil(low / step - 1e-9); place * step <= high + step * 1e-6; place++) {
      found.push(Number((place * step).toPrecision(12)));
    }
    return found;
  }
  function extent(values, margin = 0) {
    const known = values.filter(Number.isFinite);
    const low = Math.min(...known), high = Math.max(...known), room = (high - low || Math.abs(high) || 1) * margin;
    return [low - room, high + room];
  }
  function atLeast(domain, span) {
    const missing = Math.max(0, span - (domain[1] - domain[0])) / 2;
    return [domain[0] - missing, domain[1] + missing];
  }

  /* Figures. */
  const grouped = (value, digits) => value.toLocaleString("en-US", {minimumFractionDigits: digits, maximumFractionDigits: digits});
  function number(value) {
    if (value === null || value === undefined || !Number.isFinite(value)) return "–";
    const size = Math.abs(value);
    if (size >= 1e9) return short(value / 1e9) + " G";
    if (size >= 1e6) return short(value / 1e6) + " M";
    return size >= 100 ? grouped(value, 0) : short(value);
  }
  const short = value => String(Number(value.toPrecision(3)));
  const points = (value, digits = 1) => (100 * value).toFixed(digits).replace("-", "−");
  const signed = value => (value >= 0 ? "+" : "−") + Math.abs(100 * value).toFixed(1);
  const times = value => value === null ? "–" : (value >= 10 ? short(value) : value.toFixed(2)) + "×";
  const money = value => value === null ? "–" : value < 1 ? value.toPrecision(2) : grouped(value, value >= 100 ? 0 : value >= 10 ? 1 : 2);

  /* Texts of an axis' ticks: exact, with the same number of decimals unless the axis is logarithmic. */
  function tickTexts(ticks, {scale = 1, unit = "", log}) {
    const parts = ticks.map(tick => {
      const value = scale * tick, [size, prefix] = [[1e9, " G"], [1e6, " M"]].find(([least]) => Math.abs(value) >= least) || [1, ""];
      return {value: value / size, prefix, digits: decimals(value / size)};
    });
    const most = Math.max(...parts.map(one => one.digits));
    return parts.map(one => grouped(one.value, log ? one.digits : most).replace("-", "−") + one.prefix + unit);
  }
  function decimals(value) {
    let digits = 0;
    while (digits < 12 && Math.abs(Number(value.toFixed(digits)) - value) > 1e-9 * Math.abs(value)) digits++;
    return digits;
  }

  /* A frame of axes in a holder, as wide as it. Options: height, x, y = {domain, log, label, scale, unit, ticks}, margins. */
  function frame(holder, options) {
    const width = Math.max(options.least || 120, Math.round(holder.clientWidth)), height = options.height;
    const margin = {top: 10, right: 12, bottom: 42, left: 46, ...(options.margin || {})};
    const root = svg("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": options.title || ""});
    const area = {left: margin.left, right: width - margin.right, top: margin.top, bottom: height - margin.bottom};
    const X = (options.x.log ? logarithmic : linear)(options.x.domain, [area.left, area.right]);
    const Y = (options.y.log ? logarithmic : linear)(options.y.domain, [area.bottom, area.top]);
    const rows = options.y.values || Y.ticks(options.y.ticks ?? 5), rowTexts = tickTexts(rows, options.y);
    rows.forEach((value, place) => {
      root.append(svg("line", {class: "grid", x1: area.left, x2: area.right, y1: Y(value), y2: Y(value)}));
      root.append(svg("text", {x: area.left - 7, y: Y(value) + 4, "text-anchor": "end"}, rowTexts[place]));
    });
    let last = -Infinity;
    const columns = options.x.values || X.ticks(options.x.ticks ?? Math.max(3, width / 90)), columnTexts = tickTexts(columns, options.x);
    columns.forEach((value, place) => {
      const text = columnTexts[place], half = text.length * 3.4;
      if (X(value) - half < last + 6) return;
      last = X(value) + half;
      root.append(svg("line", {class: "axis", x1: X(value), x2: X(value), y1: area.bottom, y2: area.bottom + 4}));
      root.append(svg("text", {x: X(value), y: area.bottom + 17, "text-anchor": "middle"}, text));
    });
    root.append(svg("line", {class: "axis", x1: area.left, x2: area.right, y1: area.bottom, y2: area.bottom}));
    if (options.x.label) root.append(svg("text", {x: area.right, y: height - 4, "text-anchor": "end"}, options.x.label));
    if (options.y.label) root.append(svg("text", {x: 2, y: 10, class: "strong"}, options.y.label));
    holder.replaceChildren(root);
    return {root, X, Y, area, width, height};
  }

  function path(pairs) {
    return pairs.map(([x, y], place) => `${place ? "L" : "M"}${x.toFixed(1)},${y.toFixed(1)}`).join("");
  }

  const SHAPES = {
    circle: r => `M${-r},0A${r},${r} 0 1 1 ${r},0A${r},${r} 0 1 1 ${-r},0Z`,
    square: r => `M${-r * .9},${-r * .9}H${r * .9}V${r * .9}H${-r * .9}Z`,
    triangle: r => `M0,${-r * 1.15}L${r * 1.05},${r * .8}H${-r * 1.05}Z`,
    diamond: r => `M0,${-r * 1.25}L${r * 1.1},0L0,${r * 1.25}L${-r * 1.1},0Z`,
    down: r => `M0,${r * 1.15}L${r * 1.05},${-r * .8}H${-r * 1.05}Z`,
    plus: r => `M${-r * .4},${-r}H${r * .4}V${-r * .4}H${r}V${r * .4}H${r * .4}V${r}H${-r * .4}V${r * .4}H${-r}V${-r * .4}H${-r * .4}Z`,
    star: r => "M" + [...Array(10).keys()].map(k => {
      const length = (k % 2 ? 0.48 : 1.35) * r, angle = k * Math.PI / 5;
      return `${(length * Math.sin(angle)).toFixed(2)},${(-length * Math.cos(angle)).toFixed(2)}`;
    }).join("L") + "Z",
  };
  const mark = (shape, x, y, radius, attributes) =>
    svg("path", {d: SHAPES[shape](radius), transform: `translate(${x.toFixed(1)},${y.toFixed(1)})`, ...attributes});

  /* Details of a point: by pointer, by touch, and by arrow keys once the chart has the focus. */
  const tip = document.getElementById("tip"), spoken = document.getElementById("spoken");
  function showTip(lines, box) {
    tip.replaceChildren(html("b", {}, lines[0]), ...lines.slice(1).map(line => html("div", {}, line)));
    tip.hidden = false;
    const x = Math.min(Math.max(8, box.left + box.width / 2 - tip.offsetWidth / 2), innerWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 10;
    tip.style.left = x + "px";
    tip.style.top = (above > 56 ? above : box.bottom + 10) + "px";
  }
  const hideTip = () => { tip.hidden = true; };
  // What appears together with its text often goes unspoken: the words go to an element that is always there.
  const say = lines => { spoken.textContent = lines.join(", "); };
  // Screen readers keep the arrow keys to themselves in an image, and hand them to an application.
  function walkable(root, hint) {
    fill(root, {tabindex: 0, role: "application", "aria-roledescription": "chart", "aria-label": `${root.getAttribute("aria-label")}. ${hint}`}, []);
    root.addEventListener("blur", () => { hideTip(); say([]); });
  }
  function explorable(root, marks) {
    const ordered = marks.slice().sort((a, b) => a.x - b.x);
    let active = -1;
    function activate(place) {
      if (ordered[active]) ordered[active].element.classList.remove("active");
      active = place;
      if (place < 0) return hideTip();
      ordered[place].element.classList.add("active");
      showTip(ordered[place].lines, ordered[place].element.getBoundingClientRect());
    }
    const visit = place => { activate(place); say(ordered[place].lines); };
    ordered.forEach((one, place) => {
      one.element.classList.add("point");
      one.element.addEventListener("pointerenter", () => activate(place));
      one.element.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") activate(-1); });
      if (one.choose) one.element.addEventListener("click", one.choose);
    });
    walkable(root, "Arrow keys go from mark to mark.");
    root.addEventListener("keydown", event => {
      const step = {ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1}[event.key];
      if (step) visit(active < 0 && step < 0 ? ordered.length - 1 : (active + step + ordered.length) % ordered.length);
      else if (event.key === "Home") visit(0);
      else if (event.key === "End") visit(ordered.length - 1);
      else if (event.key === "Escape") activate(-1);
      else if (event.key === "Enter" && active >= 0 && ordered[active].choose) ordered[active].choose();
      else return;
      event.preventDefault();
    });
    root.addEventListener("blur", () => activate(-1));
  }
  addEventListener("scroll", hideTip, {passive: true});

  /* From light to dark, for what has an order, in the theme's own --r0 to --r5. */
  function ramp(share) {
    const place = Math.min(Math.max(share, 0), 1) * 5, low = Math.min(Math.floor(place), 4);
    return `color-mix(in srgb, var(--r${low + 1}) ${(100 * (place - low)).toFixed(1)}%, var(--r${low}))`;
  }

  return {svg, html, frame, tickTexts, path, mark, walkable, explorable, say, extent, atLeast, ramp, number, points, signed, times, money, showTip, hideTip, shapes: Object.keys(SHAPES)};
})();
