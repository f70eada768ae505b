// Invoices as JSON and CSV.

/** The answer's data with every number as it was written: JavaScript's would lose digits. */
export function exactData(text) {
    return JSON.parse(text, (name, value, context) =>
        typeof value === "number" && context?.source !== undefined ? context.source : value).data;
}

/** One answer as the service gave it; several as a list, each with its file's name. */
export function toJson(results) {
    if (results.length === 1) return `${results[0].text.trim()}\n`;
    return `[\n${results.map(({file, text}) => `{"file": ${JSON.stringify(file)}, "answer": ${text.trim()}}`).join(",\n")}\n]\n`;
}

const isNested = (value) => value !== null && typeof value === "object";

/** [column, text] of all that is in a value; members of lists are counted from 1. */
function* cells(value, path) {
    if (Array.isArray(value)) {
        for (const [i, item] of value.entries()) yield* cells(item, `${path}.${i + 1}`);
    } else if (isNested(value)) {
        for (const [name, item] of Object.entries(value)) yield* cells(item, path ? `${path}.${name}` : name);
    } else {
        yield [path, value === null || value === undefined ? "" : String(value)];
    }
}

/** A row for each line of each invoice (one row where there is none), with all of its invoice beside it. */
function rowsOf({file, text}) {
    const {line_items: lines, ...document} = exactData(text);
    const head = new Map([["file", file], ["request_id", JSON.parse(text).request_id], ...cells(document, "")]);
    const list = Array.isArray(lines) && lines.length > 0 ? lines : [null];
    return list.map((line, i) => ({
        head,
        line: line === null ? new Map() : new Map([["line", String(i + 1)], ...cells(line, isNested(line) ? "line" : "line.value")]),
    }));
}

// A spreadsheet takes these for the beginning of a formula; a decimal, also a negative one, is a number to it.
const FORMULA = /^[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]/;
const DECIMAL = /^-?\d+(\.\d+)?$/;

export function csvCell(text) {
    const safe = FORMULA.test(text) && !DECIMAL.test(text) ? `'${text}` : text;
    return /[",;\r\n\t]|^\s|\s$/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

/** RFC 4180, the columns of all results side by side. results: [{file, text}] */
export function toCsv(results) {
    const rows = results.flatMap(rowsOf);
    const columns = (part) => [...new Set(rows.flatMap((row) => [...row[part].keys()]))];
    const [heads, lines] = [columns("head"), columns("line")];
    const table = rows.map(({head, line}) => [...heads.map((name) => head.get(name)), ...lines.map((name) => line.get(name))]);
    return [[...heads, ...lines], ...table].map((row) => `${row.map((cell) => csvCell(cell ?? "")).join(",")}\r\n`).join("");
}
