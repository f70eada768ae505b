// A table of rows as /admin/… gives them, page after page.

import {element} from "./dom.js";
import {dashboardTexts as texts, number} from "./texts.js";

const TIMES = /(At|Until|Timestamp)$/;
const NOT_COUNTED = new Set(["TokenID", "StatusCode", "LineNumber"]);

export const shortTime = (time) => String(time).replace("T", " ").replace(/\.\d+/, "").replace(/Z$/, "");

/** What a value looks like, by its column. */
export function cell(column, value) {
    if (value === null || value === undefined || value === "") return element("span", {class: "absent"});
    if (column === "IsRetryable") return value ? texts.yes : texts.no;
    if (TIMES.test(column)) return element("time", {datetime: value}, shortTime(value));
    if (column === "RequestID") return element("code", {}, value);
    if (column === "Status" || column === "LogLevel" || column === "State")
        return element("span", {class: "state", "data-value": String(value).toLowerCase()}, value);
    if (column === "Threshold") return `${number(value * 100)} %`;
    if (typeof value === "number" && !NOT_COUNTED.has(column)) return number(value);
    return String(value);
}

/**
 * columns: names; show: {column: (row) => node} for those that are made of several. more: null or what gives the next
 * {rows, next} for a cursor.
 */
export function table(caption, columns, {rows, next}, {show = {}, more = null} = {}) {
    const isNumeric = (column) => !show[column] && rows.some((row) => typeof row[column] === "number") && column !== "IsRetryable";
    const style = new Map(columns.map((column) => [column, isNumeric(column) ? "number" : `column-${column}`]));
    const body = element("tbody");
    const add = (added) => body.append(...added.map((row) => element("tr", {}, columns.map((column) =>
        element("td", {class: style.get(column)}, show[column] ? show[column](row) : cell(column, row[column]))))));
    add(rows);
    const head = columns.map((column) => element("th", {scope: "col", class: style.get(column)}, texts.columns[column]));
    const frame = element("div", {class: "scroll", tabindex: "0", role: "group", "aria-label": caption},
        element("table", {}, element("caption", {class: "unseen"}, caption), element("thead", {}, element("tr", {}, head)), body));
    if (rows.length === 0) return element("p", {class: "muted"}, texts.nothing);

    let cursor = next;
    const button = element("button", {type: "button", "aria-label": texts.named(texts.more, caption), hidden: !cursor, onclick: async () => {
        if (button.hasAttribute("aria-disabled")) return;
        button.setAttribute("aria-disabled", "true");
        const page = await more(cursor);
        button.removeAttribute("aria-disabled");
        if (!page) return;
        const first = body.childElementCount;
        add(page.rows);
        cursor = page.next;
        button.hidden = !cursor;
        if (!cursor) frame.focus();
        body.children[first]?.scrollIntoView({block: "nearest"});
    }}, texts.more);
    return element("div", {class: "rows"}, frame, button);
}
