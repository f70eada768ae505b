// The dashboard's two plots, by uPlot: it draws on a canvas, in the colours of page.css.

import {element} from "./dom.js";
import {dashboardTexts as texts, number} from "./texts.js";
import uPlot from "./uplot.js";

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const WHOLE = Array.from({length: 14}, (_, i) => [1, 2, 5].map((step) => step * 10 ** i)).flat();
const compact = (values) => values.map((value) => (value === null ? "" :
    new Intl.NumberFormat(document.documentElement.lang, {notation: "compact"}).format(value)));
const short = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);

function axis(more) {
    return {stroke: colour("muted"), grid: {stroke: colour("line"), width: 1}, ticks: {show: false}, font: `12px ${
        getComputedStyle(document.body).fontFamily}`, ...more};
}

/** A figure with a plot as wide as its place, drawn anew when that or the colours change. draw(width) gives a uPlot. */
function figure(description, draw) {
    const place = element("div", {class: "plot", role: "img", "aria-label": description});
    let [plot, width] = [null, 0];
    const redraw = () => {
        plot?.destroy();
        plot = draw(width, place);
    };
    new ResizeObserver(([{contentRect}]) => {
        const isOther = Math.abs(contentRect.width - width) >= 1;
        width = Math.floor(contentRect.width);
        if (width > 0 && isOther) redraw();
    }).observe(place);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => place.isConnected && redraw());
    return element("figure", {}, place);
}

/** Tokens and requests of each day; days: [{day: "2026-01-31", tokens, requests}], the oldest first, none left out. */
export function plotDays(days, description) {
    const data = [days.map(({day}) => Date.parse(`${day}T00:00:00Z`) / 1000), days.map(({tokens}) => tokens), days.map(({requests}) => requests)];
    return figure(description, (width, place) => new uPlot({
        width, height: 260, tzDate: (seconds) => uPlot.tzDate(new Date(seconds * 1000), "Etc/UTC"),
        cursor: {y: false, drag: {setScale: false}},
        scales: {
            x: {time: true, range: (_, min, max) => [min - 43_200, max + 43_200]},
            y: {range: (_, min, max) => [0, Math.max(max * 1.1, 1)]},
            requests: {range: (_, min, max) => [0, Math.max(max * 1.1, 1)]},
        },
        axes: [
            axis({grid: {show: false}, values: (_, ticks) => ticks.map((tick) => new Date(tick * 1000).toISOString().slice(5, 10)),
                incrs: [1, 2, 3, 7, 14, 30, 90].map((count) => count * 86_400)}),
            axis({scale: "y", size: 60, incrs: WHOLE, values: (_, ticks) => compact(ticks)}),
            axis({scale: "requests", side: 1, size: 50, grid: {show: false}, incrs: WHOLE, values: (_, ticks) => compact(ticks)}),
        ],
        series: [
            {label: texts.series.day, value: (_, seconds) => (seconds === null ? "–" : new Date(seconds * 1000).toISOString().slice(0, 10))},
            {label: texts.series.tokens, scale: "y", stroke: colour("accent"), fill: colour("accent"), paths: uPlot.paths.bars({size: [0.7, 48]}),
                points: {show: false}, value: (_, value) => (value === null ? "–" : number(value))},
            {label: texts.series.requests, scale: "requests", stroke: colour("warn"), width: 2,
                points: {show: true, size: 6, fill: colour("warn")}, value: (_, value) => (value === null ? "–" : number(value))},
        ],
    }, data, place));
}

/** Tokens of each name, one bar below the other; bars: [{name, tokens}], the largest first. */
export function plotBars(bars, description) {
    const data = [bars.map((_, i) => i), bars.map(({tokens}) => tokens)];
    return figure(description, (width, place) => new uPlot({
        width, height: 48 + bars.length * 30, legend: {show: false}, cursor: {show: false},
        scales: {
            x: {time: false, ori: 1, dir: -1, range: () => [-0.5, bars.length - 0.5]},
            y: {ori: 0, dir: 1, range: (_, min, max) => [0, Math.max(max * 1.05, 1)]},
        },
        axes: [
            axis({side: 3, size: Math.min(170, width / 3), stroke: colour("text"), grid: {show: false}, splits: () => data[0],
                values: (_, splits) => splits.map((i) => short(bars[i]?.name ?? "", width < 500 ? 13 : 22))}),
            axis({side: 2, space: 70, incrs: WHOLE, values: (_, ticks) => compact(ticks)}),
        ],
        series: [{}, {fill: colour("accent"), stroke: colour("accent"), width: 0, paths: uPlot.paths.bars({size: [0.6, 22]}), points: {show: false}}],
    }, data, place));
}
