// The interactive page: RECORDS (records.js) holds the benchmark's lines and COSTS what each defence takes, in ms an
// image; Plotly draws them. Works from disk.
(function () {
  const keys = ["profile", "recogniser", "goal", "attack", "defence", "budget"];
  const select = Object.fromEntries([...keys, "view"].map((key) => [key, document.getElementById(key)]));
  const unique = (values) => [...new Set(values)];
  const dark = () => document.documentElement.dataset.theme === "dark";
  const lines = (wanted) => RECORDS.filter((line) => Object.entries(wanted).every(([key, value]) => line[key] === value));
  const trades = () => ["tradeoff", "cost"].includes(select.view.value);
  const milliseconds = (line) => COSTS[line.profile][line.defence] || 0;

  let traded = false; // whether the view before was one of the trade-offs, which begin with the worst case

  function fill(key, values, fallback, anew) {
    const before = (!anew && select[key].value) || fallback;
    select[key].replaceChildren(...values.map((value) => new Option(value, value)));
    if (values.includes(before)) select[key].value = before;
  }

  // The lines of an attack that knows of no defence, or of the worst case of all in the budget.
  const of = (attack) => (line) => line.attack === attack && (attack === "worst" || line.way === "static");

  function choices() {
    fill("profile", unique(RECORDS.map((line) => line.profile)), "lfw");
    const here = lines({ profile: select.profile.value }).filter((line) => !line.source);
    fill("recogniser", unique(here.map((line) => line.recogniser)), "dlib");
    fill("goal", unique(here.map((line) => line.goal)), "dodging");
    const chosen = here.filter((line) => line.recogniser === select.recogniser.value && line.goal === select.goal.value);
    const grid = here.filter((line) => line.way === "static");
    const attacks = unique(grid.map((line) => line.attack)).filter((name) => name !== "noise");
    const known = chosen.some(of("worst")) ? ["worst"] : [];
    fill("attack", trades() ? [...known, ...attacks.filter((name) => name !== "none")] : attacks, trades() ? "worst" : "PGD", trades() !== traded);
    traded = trades();
    fill("defence", unique(grid.map((line) => line.defence)), "resgn");
    const budgets = unique(chosen.filter(of(select.attack.value)).map((line) => line.eps_255)).filter((eps) => eps < 255);
    fill("budget", budgets.sort((a, b) => a - b).map(String), String(here[0].main_eps));
  }

  const error = (rows) => ({
    type: "data", symmetric: false, thickness: 0.8, width: 3, color: dark() ? "#ddd" : "#333",
    array: rows.map((line) => line.high - line.right), arrayminus: rows.map((line) => line.right - line.low),
  });

  function bars(rows, name) {
    return [{
      type: "bar", x: rows.map(name), y: rows.map((line) => line.right), marker: { color: "#2c6fb0" }, error_y: error(rows),
    }];
  }

  function curve(rows, name, dash) {
    const part = [...rows].sort((a, b) => a.eps_255 - b.eps_255);
    return {
      type: "scatter", mode: "lines+markers", name, line: { dash }, x: part.map((line) => line.eps_255), y: part.map((line) => line.right),
    };
  }

  // Points (x, y) that no other one beats in both, from left to right; less: whether a smaller x is the better one.
  function front(points, less) {
    const better = (a, b) => (less ? a.x <= b.x : a.x >= b.x) && a.y >= b.y && (a.x !== b.x || a.y !== b.y);
    return points.filter((p) => !points.some((other) => better(other, p))).sort((a, b) => a.x - b.x);
  }

  // One label for points that lie together: the first has all their names, the others none.
  function labels(rows, points, byTime) {
    const place = (p) => (byTime ? 40 * Math.log10(p.x) : p.x);
    const near = (p, q) => Math.abs(place(p) - place(q)) < 4 && Math.abs(p.y - q.y) < 4;
    const firsts = points.map((p) => points.findIndex((q) => near(p, q)));
    return rows.map((_, i) => rows.filter((_, j) => firsts[j] === i).map((line) => line.defence).join(byTime ? "<br>" : ", "));
  }

  // What a defence keeps under an attack, against its clean accuracy or its time.
  function tradeoff(rows, clean, byTime) {
    const untouched = rows.map((line) => clean.find((one) => one.defence === line.defence));
    const points = rows.map((line, i) => ({ x: byTime ? Math.max(milliseconds(line), 0.1) : untouched[i].right, y: line.right }));
    const most = Math.max(...rows.map((line) => line.n));
    const dots = {
      type: "scatter", mode: "markers+text", showlegend: false, textposition: byTime ? "top center" : "top right", cliponaxis: false, hoverinfo: "text",
      x: points.map((p) => p.x), y: points.map((p) => p.y), text: labels(rows, points, byTime), error_y: error(rows),
      hovertext: rows.map((line, i) => `${line.defence}: ${line.right.toFixed(0)} %, clean ${untouched[i].right.toFixed(0)} %, ${milliseconds(line)} ms`),
      marker: {
        size: 11, line: { width: 1, color: "#888" }, symbol: rows.map((line) => (line.n < most ? "circle-open" : "circle")),
        color: rows.map((line) => Math.log10(Math.max(milliseconds(line), 0.1))), colorscale: "Cividis", reversescale: true,
        showscale: !byTime, colorbar: { title: { text: "ms" }, thickness: 10, x: 1.15, tickvals: [-1, 0, 1, 2], ticktext: ["0.1", "1", "10", "100"] },
      },
    };
    if (!byTime) dots.error_x = error(untouched);
    const best = front(points.filter((_, i) => rows[i].n === most), byTime);
    const line = {
      type: "scatter", mode: "lines", name: "no full dot is better in both", showlegend: true, hoverinfo: "skip",
      line: { dash: "dot", color: "#999", shape: byTime ? "hv" : "vh" }, x: best.map((p) => p.x), y: best.map((p) => p.y),
    };
    return [line, dots];
  }

  function table(rows) {
    const cells = (tag, values) => `<tr>${values.map((value) => `<${tag}>${value}</${tag}>`).join("")}</tr>`;
    const head = cells("th", ["defence", "attack", "way", "budget", "right, %", "95 %", "pairs", "ms"]);
    const body = rows.map((line) => cells("td", [
      line.defence, line.attack, line.way, line.attack === "none" ? "–" : line.eps_255, line.right.toFixed(0),
      `${line.low.toFixed(0)} to ${line.high.toFixed(0)}`, line.n, milliseconds(line),
    ]));
    return `<table class="table">${head}${body.join("")}</table>`;
  }

  function draw() {
    choices();
    const view = select.view.value;
    document.getElementById("attack-label").hidden = view !== "attack" && !trades();
    document.getElementById("defence-label").hidden = view !== "defence" && view !== "curve";
    document.getElementById("budget-label").hidden = !trades();
    const wanted = Object.fromEntries(["profile", "recogniser", "goal"].map((key) => [key, select[key].value]));
    const all = lines(wanted).filter((line) => !line.source && line.attack !== "noise");
    const main = RECORDS.find((line) => line.profile === wanted.profile).main_eps;
    const grid = all.filter((line) => line.way === "static" && line.eps_255 === main);
    const clean = grid.filter((line) => line.attack === "none");
    const { attack, defence } = { attack: select.attack.value, defence: select.defence.value };
    let rows, data, title, across = {};
    if (view === "map") {
      rows = grid;
      const attacks = unique(grid.map((line) => line.attack));
      const defences = unique(grid.map((line) => line.defence)).reverse();
      const at = (row, column) => (grid.find((line) => line.defence === row && line.attack === column) || {}).right;
      const z = defences.map((row) => attacks.map((column) => at(row, column)));
      const text = z.map((row) => row.map((value) => (value === undefined ? "" : value.toFixed(0))));
      data = [{ type: "heatmap", x: attacks, y: defences, z, text, texttemplate: "%{text}", zmin: 0, zmax: 100, colorscale: "Cividis" }];
      title = `static attacks at ${main}/255`;
    } else if (view === "attack") {
      rows = grid.filter((line) => line.attack === attack);
      data = bars(rows, (line) => line.defence);
      title = `${attack}, static, at ${main}/255`;
    } else if (view === "defence") {
      rows = all.filter((line) => line.defence === defence && line.eps_255 === main);
      data = bars(rows, (line) => (line.way === "static" ? line.attack : `${line.attack}, ${line.way}`));
      title = `behind ${defence} at ${main}/255`;
    } else if (view === "curve") {
      const zero = (name) => clean.filter((line) => line.defence === name).map((line) => ({ ...line, eps_255: 0 }));
      const bare = [...zero("none"), ...all.filter((line) => line.defence === "none" && line.attack === "worst")];
      const mine = all.filter((line) => line.defence === defence && line.eps_255 < 255);
      const worst = mine.filter((line) => line.attack === "worst");
      const ways = unique(mine.filter((line) => line.attack === "PGD").map((line) => line.way));
      const by = ways.map((way) => mine.filter((line) => line.attack === "PGD" && line.way === way));
      rows = worst.length ? [...bare, ...zero(defence), ...worst, ...by.flat()] : [];
      data = worst.length ? [
        curve(bare, "worst case, no defence", "dot"), curve([...zero(defence), ...worst], `worst case, ${defence}`, "solid"),
        ...by.map((part, i) => curve([...zero(defence), ...part], `PGD, ${ways[i]}`, "dash")),
      ] : [];
      title = `behind ${defence}, against the budget`;
      across = { title: { text: "budget, of 255" } };
    } else {
      const budget = Number(select.budget.value);
      rows = all.filter(of(attack)).filter((line) => line.eps_255 === budget && clean.some((one) => one.defence === line.defence));
      data = tradeoff(rows, clean, view === "cost");
      rows = [...rows, ...clean];
      title = attack === "worst" ? `worst case at ${budget}/255` : `${attack}, static, at ${budget}/255`;
      across = view === "cost"
        ? { type: "log", title: { text: "time of the defence, ms an image (0.1 or less at the left)" } }
        : { title: { text: "clean accuracy, %" } };
    }
    if (!rows.length) title = "nothing was measured here: choose another recogniser, goal or defence";
    const layout = {
      title: { text: title, font: { size: 14 } }, margin: { t: 40, l: view === "map" ? 130 : 50, r: view === "tradeoff" ? 110 : 10, b: 90 }, xaxis: across,
      yaxis: view === "map" ? {} : { range: trades() ? [-5, 118] : [0, 105], title: { text: "right decisions, %" } },
      legend: { orientation: "h", y: -0.25 }, height: 480, font: { color: dark() ? "#ddd" : "#222" },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    };
    Plotly.newPlot("chart", data, layout, { responsive: true, displayModeBar: false });
    document.getElementById("numbers").innerHTML = table(rows);
  }

  Object.values(select).forEach((element) => element.addEventListener("change", draw));
  new MutationObserver(draw).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  draw();
})();
