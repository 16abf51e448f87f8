"use strict";
(() => {
  const plots = [...document.querySelectorAll("[data-chart]")];
  const say = (text) => plots.forEach((plot) => {
    const note = plot.querySelector(".waiting");
    if (note) note.textContent = text;
  });

  // Plotly travels compressed (2 MB instead of 5) and is unpacked after the page is readable.
  async function unpack() {
    const packed = atob(document.getElementById("plotly").textContent);
    const bytes = Uint8Array.from(packed, (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    return window.Plotly;
  }

  // "@name" in a figure is the theme's colour of that name.
  function coloured(value, theme) {
    if (typeof value === "string" && value.startsWith("@")) {
      return theme.getPropertyValue("--" + value.slice(1)).trim() || value;
    }
    if (Array.isArray(value)) return value.map((item) => coloured(item, theme));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, coloured(v, theme)]));
    }
    return value;
  }

  function laidOut(layout, theme) {
    const narrow = window.innerWidth < 640;
    const coarse = matchMedia("(pointer: coarse)").matches;
    const axis = {
      gridcolor: "@grid", linecolor: "@line", tickcolor: "@line", zeroline: false,
      showline: true, automargin: true, fixedrange: coarse,
    };
    const base = {
      autosize: true,
      paper_bgcolor: "@surface", plot_bgcolor: "@surface",
      font: { family: theme.getPropertyValue("--sans").trim(), size: 13, color: "@ink" },
      margin: { l: narrow ? 44 : 54, r: 12, t: 8, b: 44 },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: narrow ? 11 : 12 } },
      hoverlabel: { bgcolor: "@surface", bordercolor: "@line", font: { color: "@ink" } },
      // A finger that scrolls the page must not draw a zoom box.
      dragmode: coarse ? false : "zoom",
      showlegend: true,
    };
    const merged = { ...base, ...layout };
    for (const name of ["xaxis", "yaxis"]) {
      merged[name] = { ...axis, ...layout[name] };
      if (merged[name].title) {
        merged[name].title = { standoff: 8, font: { size: 13, color: "@muted" }, ...merged[name].title };
      }
    }
    if (layout.barmode === undefined && !layout.hovermode) merged.hovermode = "closest";
    return coloured(merged, theme);
  }

  function draw(plotly, plot) {
    const figure = JSON.parse(document.getElementById("chart-" + plot.dataset.chart).textContent);
    const theme = getComputedStyle(document.documentElement);
    const config = {
      responsive: true, displaylogo: false, displayModeBar: "hover",
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
    };
    plot.querySelector(".waiting")?.remove();
    return plotly.react(
      plot, coloured(figure.data, theme), laidOut(figure.layout, theme), config,
    );
  }

  const idle = () => new Promise((done) => (window.requestIdleCallback ?? setTimeout)(done));

  async function start() {
    if (!plots.length) return;
    if (!("DecompressionStream" in window)) {
      say("This browser cannot unpack the charts; the numbers are in the tables.");
      return;
    }
    say("The chart is on its way.");
    await idle();
    const plotly = await unpack();
    if (!plotly) {
      say("The charts could not be loaded; the numbers are in the tables.");
      return;
    }
    for (const plot of plots) {
      await idle();
      await draw(plotly, plot);
    }
    document.documentElement.dataset.charts = "drawn";
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      plots.forEach((plot) => draw(plotly, plot));
    });
  }

  start();
})();
