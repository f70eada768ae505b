// The administrators' dashboard: what /admin/… says, by period and company.

import {csv, page, Refusal} from "./admin.js";
import {download, element} from "./dom.js";
import {plotBars, plotDays} from "./plots.js";
import {shortTime, table} from "./table.js";
import {dashboardTexts as texts, language, number} from "./texts.js";

const $ = (id) => document.getElementById(id);
const KEPT = "extract-fcgi.admin-key";
const ROWS = 20;
const BARS = 10;
const DAY_MS = 86_400_000;
const SUMS = ["Requests", "RequestCount", "InputTokens", "OutputTokens", "TotalTokensUsed", "UnknownCalls"];

let asked = 0; // counts what was asked for: an answer to an older question is nobody's
let by = "company";

function say(text) {
    $("said").append(element("p", {}, text));
    while ($("said").childElementCount > 20) $("said").firstElementChild.remove();
}

// ---- the key, kept only where that was ticked ----

function keep() {
    try {
        if ($("remember").checked && $("key").value) localStorage.setItem(KEPT, $("key").value.trim());
        else localStorage.removeItem(KEPT);
    } catch {
        // a browser without storage remembers nothing
    }
}

function recall() {
    try {
        $("key").value = localStorage.getItem(KEPT) ?? "";
    } catch {
        return;
    }
    $("remember").checked = $("key").value !== "";
}

// ---- the question ----

const today = () => new Date().toISOString().slice(0, 10);
const dayAfter = (day) => new Date(Date.parse(day) + DAY_MS).toISOString().slice(0, 10);

function showError(id, text) {
    $(`${id}-error`).textContent = text;
    $(`${id}-error`).hidden = !text;
}

/** {key, time: {since, until}, company, days: [first, last]}, or null with the mistake shown. */
function question() {
    const key = $("key").value.trim();
    showError("key", /^[\x21-\x7e]+$/.test(key) ? "" : texts.missingKey);
    if (!$("key-error").hidden) {
        $("key").setAttribute("aria-invalid", "true");
        $("key").focus();
        return null;
    }
    $("key").removeAttribute("aria-invalid");
    const isDates = $("period").value === "dates";
    const [from, to] = [$("from").value, $("to").value];
    showError("dates", isDates && !(from && to && from <= to) ? texts.badDates : "");
    if (!$("dates-error").hidden) {
        $("from").focus();
        return null;
    }
    const company = $("company").value.trim();
    if (isDates) return {key, company, time: {since: from, until: dayAfter(to)}, days: [from, to]};
    const hours = {h: 1, d: 24}[$("period").value.at(-1)] * Number.parseInt($("period").value, 10);
    const first = new Date(Date.now() - hours * 3_600_000).toISOString();
    return {key, company, time: {since: first, until: null}, days: [first.slice(0, 10), today()]};
}

// ---- panels ----

function panel(id, ...content) {
    const [title, ...rest] = content;
    const heading = element("h2", {id: `${id}-title`}, texts.panels[id]);
    $(id).setAttribute("aria-labelledby", `${id}-title`);
    $(id).replaceChildren(element("div", {class: "bar"}, heading, title), ...rest.flat().filter(Boolean));
}

function csvButton(id, path, parameters, key) {
    const name = `${id}.csv`;
    return element("button", {type: "button", class: "to-right", "aria-label": texts.named(texts.csv, texts.panels[id]), onclick: async () => {
        try {
            download(name, "text/csv;charset=utf-8", `\ufeff${await csv(path, parameters, key)}`);
            say(texts.saved(name));
        } catch (refusal) {
            refused(refusal);
        }
    }}, texts.csv);
}

/** A panel with one table, its further pages and its CSV. */
async function list(id, {key, ...asking}, path, columns, {note, cells, limit = ROWS} = {}) {
    const parameters = asking.parameters;
    const ask = (cursor) => page(path, {...parameters, limit, cursor}, key);
    const first = await ask(null);
    const more = (cursor) => ask(cursor).catch(refused);
    return () => {
        panel(id, csvButton(id, path, parameters, key), note && element("p", {class: "hint"}, note),
            table(texts.panels[id], columns, first, {show: cells, more}));
        return first;
    };
}

function bar(row) {
    const {TotalUsedTokens: used, TotalTokenLimit: limit} = row;
    if (limit === null) return element("span", {}, texts.noLimit(number(used)));
    const words = texts.of(number(used), number(limit));
    return element("div", {class: row.ThresholdCrossedAt ? "use over" : "use"}, element("span", {}, words),
        element("progress", {max: String(Math.max(limit, 1)), value: String(Math.min(used, limit)), "aria-label": words}));
}

function health(row) {
    const isCooling = row.CooldownUntil && Date.parse(row.CooldownUntil) > Date.now();
    return element("div", {class: "health"},
        element("span", {class: "state", "data-value": String(row.Status).toLowerCase()}, row.Status ?? ""),
        isCooling && element("span", {class: "hint"}, texts.coolingUntil(shortTime(row.CooldownUntil))),
        row.ThresholdCrossedAt && row.Status === "Active" && element("span", {class: "hint"}, texts.overThreshold));
}

function everyDay(rows, [first, last]) {
    const known = new Map(rows.map((row) => [row.Day, row]));
    const days = [];
    for (let day = first; day <= last; day = dayAfter(day))
        days.push({day, tokens: known.get(day)?.TotalTokensUsed ?? 0, requests: known.get(day)?.Requests ?? 0});
    return days;
}

async function overTime({key, company, time, days}) {
    const parameters = {...time, company, by: "day"};
    const {rows, next} = await page("usage", {...parameters, limit: 1000}, key);
    return () => {
        const total = (column) => number(rows.reduce((sum, row) => sum + row[column], 0));
        const words = texts.plotTime(number(rows.length), total("TotalTokensUsed"), total("Requests"));
        panel("time", csvButton("time", "usage", parameters, key), element("p", {class: "hint"}, words),
            plotDays(everyDay(rows, days), words),
            element("details", {}, element("summary", {}, texts.asTable), table(texts.panels.time, ["Day", ...SUMS], {rows, next},
                {more: (cursor) => page("usage", {...parameters, limit: 1000, cursor}, key).catch(refused)})));
    };
}

const SHARES = {
    company: {columns: ["CompanyID"], name: (row) => row.CompanyID},
    branch: {columns: ["CompanyID", "Branch"], name: (row) => row.Branch},
    user: {columns: ["CompanyID", "RequestedBy"], name: (row) => row.RequestedBy},
    token: {columns: ["CompanyID", "TokenID", "TokenSource"], name: (row) => `${row.CompanyID ?? ""} ${row.TokenID ?? row.TokenSource ?? ""}`.trim()},
};

async function shares(asking) {
    const {key, company, time} = asking;
    const parameters = {...time, company, by};
    const first = await page("usage", {...parameters, limit: ROWS}, key);
    return () => {
        const {columns, name} = SHARES[by];
        const bars = first.rows.slice(0, BARS).map((row) => ({name: name(row) || texts.unnamed, tokens: row.TotalTokensUsed}));
        const select = element("select", {id: "by", onchange: async () => {
            by = select.value;
            const mine = asked;
            try {
                const shown = await shares(asking);
                if (mine !== asked) return;
                shown();
                $("by").focus();
            } catch (refusal) {
                refused(refusal);
            }
        }}, Object.entries(texts.share).map(([value, words]) => element("option", {value, selected: value === by}, words)));
        panel("share", [element("label", {for: "by", class: "unseen"}, texts.by), select, csvButton("share", "usage", parameters, key)],
            bars.length > 0 && plotBars(bars, texts.plotShare(bars[0].name, number(bars[0].tokens))),
            table(texts.panels.share, [...columns, ...SUMS], first,
                {more: (cursor) => page("usage", {...parameters, limit: ROWS, cursor}, key).catch(refused)}));
    };
}

function overview(statuses, unsettled, outbox) {
    const sum = (column, wanted = () => true) => statuses.filter(wanted).reduce((total, row) => total + (row[column] ?? 0), 0);
    const isActive = ({Status: status}) => status === "Active";
    const limit = sum("TotalTokenLimit");
    const unlimited = sum("Unlimited");
    const count = (state) => outbox.filter(({State: it}) => it.toLowerCase() === state).reduce((total, row) => total + row.Count, 0);
    const cards = {
        active: [number(sum("Count", isActive))],
        over: [number(sum("OverThreshold")), sum("OverThreshold") > 0 && "warn"],
        cooling: [number(sum("Cooling")), sum("Cooling") > 0 && "warn"],
        out: [number(sum("Count", (row) => !isActive(row)))],
        used: [texts.of(number(sum("TotalUsedTokens")), number(limit)), null, unlimited > 0 && texts.unlimited(unlimited)],
        remaining: [number(sum("TotalRemainingTokens"))],
        reserved: [number(sum("ReservedTokens"))],
        unsettled: [unsettled.next ? texts.atLeast(unsettled.rows.length) : number(unsettled.rows.length), unsettled.rows.length > 0 && "bad"],
        waiting: [number(count("waiting")), count("waiting") > 0 && "warn"],
        dead: [number(count("dead")), count("dead") > 0 && "bad"],
    };
    panel("overview", null, element("dl", {class: "cards"}, Object.entries(cards).map(([name, [value, mood, more]]) =>
        element("div", {class: "figure", "data-card": name, "data-mood": mood || false}, element("dt", {}, texts.cards[name]),
            element("dd", {}, value, more && element("span", {class: "hint"}, ` ${more}`))))));
}

// ---- asking and showing ----

function refused(refusal) {
    if (!(refusal instanceof Refusal)) throw refusal;
    $("problem").replaceChildren(...[
        element("p", {class: "problem-detail"}, refusal.message),
        refusal.status === 404 && element("p", {}, texts.notHere),
        refusal.requestId && element("p", {class: "hint"}, texts.requestId(refusal.requestId)),
    ].filter(Boolean));
    $("problem").hidden = false;
    $("problem").focus();
    return null;
}

async function show(asking) {
    const mine = ++asked;
    const {key, company, time} = asking;
    const within = {key, parameters: {...time, company}};
    $("problem").hidden = true;
    $("status").textContent = texts.showing;
    $("panels").setAttribute("aria-busy", "true");
    try {
        const [statuses, states, ...panels] = await Promise.all([
            page("tokens", {by: "status", company}, key),
            page("outbox", {by: "state"}, key),
            list("unsettled", within, "unsettled", ["CreatedAt", "CompanyID", "Branch", "RequestedBy", "TokenID", "State", "UnknownCalls",
                "EstimatedTokens", "RequestID"], {note: texts.notes.unsettled}),
            list("tokens", {key, parameters: {company}}, "tokens", ["Status", "TokenID", "CompanyID", "CompanyName", "ApiKey", "Used",
                "TotalRemainingTokens", "ReservedTokens", "Threshold", "StatusReason", "CreatedAt"], {cells: {Status: health, Used: bar}}),
            overTime(asking),
            shares(asking),
            list("errors", within, "errors", ["Timestamp", "LogLevel", "Message", "Exception", "RequestID", "Host"]),
            list("retries", within, "retries", ["Timestamp", "CompanyID", "TokenID", "Attempt", "StatusCode", "IsRetryable", "ErrorMessage", "RequestID"]),
            list("outbox", within, "outbox", ["CreatedAt", "State", "Kind", "CompanyID", "RequestedBy", "TotalTokensUsed", "Attempts", "LastError",
                "RequestID"], {note: texts.notes.outbox}),
        ]);
        if (mine !== asked) return;
        $("panels").hidden = false;
        const [unsettled] = panels.map((shown) => shown());
        overview(statuses.rows, unsettled, states.rows);
        $("status").textContent = texts.shown(shortTime(new Date().toISOString()));
    } catch (refusal) {
        if (mine !== asked) return;
        $("status").textContent = "";
        $("panels").hidden = true;
        refused(refusal);
    } finally {
        if (mine === asked) $("panels").removeAttribute("aria-busy");
    }
}

// ---- to begin with ----

document.documentElement.lang = language;
for (const node of document.querySelectorAll("[data-text]")) node.textContent = texts[node.dataset.text];
for (const [value, words] of Object.entries(texts.periods)) $("period").append(element("option", {value, selected: value === "30d"}, words));
$("to").value = today();
$("from").value = new Date(Date.now() - 30 * DAY_MS).toISOString().slice(0, 10);

$("period").addEventListener("change", () => {
    for (const node of document.querySelectorAll("[data-dates]")) node.hidden = $("period").value !== "dates";
});
$("remember").addEventListener("change", keep);
$("key").addEventListener("input", keep);
$("forget").addEventListener("click", () => {
    $("key").value = "";
    $("remember").checked = false;
    keep();
    say(texts.forgotten);
});
$("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const asking = question();
    if (asking) show(asking);
});

recall();
if ($("key").value) $("form").requestSubmit();
document.documentElement.dataset.ready = "yes";
