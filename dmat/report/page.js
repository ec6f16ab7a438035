// Draws the charts of the page in its colours. Redraws them for printing and when the colour scheme changes.
(function () {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const PAPER = 640; // px: width of a printed page

  function coloured(layout, printing) {
    const style = getComputedStyle(document.documentElement);
    const ink = printing ? "#212529" : style.getPropertyValue("--ink").trim();
    const line = printing ? "#dee2e6" : style.getPropertyValue("--line").trim();
    const axis = { gridcolor: line, linecolor: line, zerolinecolor: ink };
    return Object.assign({}, layout, {
      font: Object.assign({}, layout.font, { color: ink }),
      xaxis: Object.assign({}, layout.xaxis, axis),
      yaxis: Object.assign({}, layout.yaxis, axis),
      modebar: { bgcolor: "rgba(0,0,0,0)", color: line, activecolor: ink },
      width: printing ? PAPER : undefined,
      autosize: !printing,
    });
  }

  function draw(printing) {
    for (const [name, chart] of Object.entries(charts)) {
      const element = document.getElementById("chart-" + name);
      const options = { responsive: !printing, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };
      if (printing) options.displayModeBar = false; // otherwise it appears in print under the pointer
      Plotly.react(element, chart.data, coloured(chart.layout, printing), options);
    }
  }

  draw(false);
  document.documentElement.dataset.charts = Object.keys(charts).length;
  dark.addEventListener("change", () => draw(false));
  window.addEventListener("beforeprint", () => draw(true));
  window.addEventListener("afterprint", () => draw(false));
})();
