// An invoice for reading: the fields that are known in their places, what else there is below them, and each
// warning at the field that it is about (a JSON Pointer, RFC 6901).

import {element, unseen} from "./dom.js";
import {fieldLabel, texts} from "./texts.js";

const META = ["issue_date", "due_date", "currency", "purchase_order", "payment_terms"];
const PARTIES = {
    vendor: ["name", "address", "tax_id", "registration_id", "email", "iban", "bic"],
    customer: ["name", "address", "tax_id"],
};
const LINES = ["description", "product_code", "quantity", "unit", "unit_price", "tax_rate", "tax_amount", "amount"];
const TAXES = ["rate", "base", "amount"];
const TOTALS = ["subtotal", "discount", "tax", "total", "amount_paid", "amount_due"];
const NUMERIC = new Set(["quantity", "unit_price", "tax_rate", "tax_amount", "amount", "rate", "base"]);
const PLACED = new Set(["document_type", "invoice_number", ...META, ...Object.keys(PARTIES), "line_items", "taxes", "totals"]);

const isNested = (value) => value !== null && typeof value === "object";
const isRecord = (value) => isNested(value) && !Array.isArray(value);
const isAbsent = (value) => value === null || value === undefined || value === "";
const step = (name) => `/${String(name).replaceAll("~", "~0").replaceAll("/", "~1")}`;
const steps = (pointer) => pointer.split("/").slice(1).map((s) => s.replaceAll("~1", "/").replaceAll("~0", "~"));

/** The names that somebody's own schema adds come after those that are known. */
function names(known, ...values) {
    const others = values.filter(isRecord).flatMap((value) => Object.keys(value));
    return [...new Set([...known, ...others])];
}

function where(pointer) {
    return steps(pointer).map((s) => (/^\d+$/.test(s) ? String(Number(s) + 1) : fieldLabel(s))).join(" › ");
}

class Sheet {
    #warnings;
    #places = new Map(); // pointer: the element that stands for it

    constructor(warnings) {
        this.#warnings = warnings;
    }

    #said(pointer) {
        return this.#warnings.filter((warning) => warning.field === pointer)
            .map((warning) => element("span", {class: "warning"}, unseen(`${texts.warning} `), warning.detail));
    }

    /** The element stands for the pointer: its warnings are said in it, and it can be gone to. */
    #place(pointer, node) {
        this.#places.set(pointer, node);
        const said = this.#said(pointer);
        if (said.length > 0) {
            node.classList.add("warned");
            node.setAttribute("tabindex", "-1");
            node.append(...said);
        }
        return node;
    }

    #shown(value) {
        if (isAbsent(value)) return element("span", {class: "absent"}, unseen(texts.absent));
        if (typeof value === "boolean") return value ? texts.yes : texts.no;
        return String(value);
    }

    /** Of any value: a text, a table of records, a list, or terms. */
    #value(pointer, value, name = "div") {
        if (Array.isArray(value) && value.length > 0 && value.every(isRecord)) return this.#table(pointer, value, [], name);
        if (Array.isArray(value)) {
            const items = value.map((item, i) => this.#value(pointer + step(i), item, "li"));
            return this.#place(pointer, element(name, {}, element("ul", {}, items)));
        }
        if (isRecord(value)) return this.#place(pointer, element(name, {}, this.#terms(pointer, value, [])));
        return this.#place(pointer, element(name, {}, element("span", {class: "value"}, this.#shown(value))));
    }

    #terms(pointer, record, known, style = "") {
        const rows = names(known, record).map((name) => element("div", {class: `term term-${name.replaceAll(/\W/g, "-")}`},
            element("dt", {}, fieldLabel(name)), this.#value(pointer + step(name), record?.[name], "dd")));
        return element("dl", {class: `terms ${style}`}, rows);
    }

    #table(pointer, list, known, name = "div") {
        const isUsed = (column) => list.some((row, i) => !isAbsent(row?.[column]) ||
            this.#warnings.some(({field}) => field.startsWith(pointer + step(i) + step(column))));
        const columns = names(known, ...list).filter(isUsed);
        const style = (column) => (NUMERIC.has(column) ? "number" : `column-${column.replaceAll(/\W/g, "-")}`);
        const head = element("tr", {}, columns.map((column) =>
            element("th", {scope: "col", class: style(column)}, fieldLabel(column))));
        const rows = list.map((row, i) => this.#place(pointer + step(i), element("tr", {}, columns.map((column) => {
            const cell = this.#value(pointer + step(i) + step(column), row?.[column], "td");
            cell.classList.add(style(column));
            return cell;
        }))));
        const title = fieldLabel(steps(pointer).at(-1) ?? "");
        const table = element("table", {}, element("caption", {class: "unseen"}, title), element("thead", {}, head),
            element("tbody", {}, rows));
        const frame = element("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": title}, table);
        return this.#place(pointer, element(name, {}, frame));
    }

    #section(pointer, title, ...content) {
        const section = element("section", {}, element("h5", {}, title), content);
        return pointer === null || this.#places.has(pointer) ? section : this.#place(pointer, section);
    }

    #list(pointer, list, known) {
        const isEmpty = isAbsent(list) || Array.isArray(list) && list.length === 0;
        if (isEmpty) return this.#place(pointer, element("div", {}, element("p", {class: "muted"}, texts.none)));
        const isTable = Array.isArray(list) && list.every(isRecord);
        return isTable ? this.#table(pointer, list, known) : this.#value(pointer, list);
    }

    #party(name, record) {
        const pointer = step(name);
        const content = isAbsent(record) || isRecord(record) ? this.#terms(pointer, record, PARTIES[name])
            : this.#value(pointer, record);
        return this.#section(pointer, fieldLabel(name), content);
    }

    #overview() {
        if (this.#warnings.length === 0) return null;
        const items = this.#warnings.map(({field, detail}) => {
            let pointer = field;
            while (pointer && !this.#places.has(pointer)) pointer = pointer.slice(0, pointer.lastIndexOf("/"));
            const place = this.#places.get(pointer);
            const words = field ? where(field) : "";
            if (!place) return element("li", {}, words && element("strong", {}, words), words && ": ", detail);
            const go = () => {
                place.setAttribute("tabindex", "-1");
                place.focus();
                place.scrollIntoView({block: "center"});
            };
            return element("li", {}, element("button", {type: "button", class: "link", onclick: go}, words), ": ", detail);
        });
        return element("div", {class: "note warnings"},
            element("p", {}, element("strong", {}, texts.warnings(this.#warnings.length))), element("ul", {}, items));
    }

    render(data) {
        const kind = Object.hasOwn(texts.documentTypes, data.document_type ?? "") ? texts.documentTypes[data.document_type]
            : data.document_type ?? texts.invoice;
        const heading = element("h4", {class: "invoice-title"}, this.#place("/document_type", element("span", {}, String(kind))), " ",
            this.#place("/invoice_number", element("span", {class: "invoice-number"}, this.#shown(data.invoice_number))));
        const meta = element("dl", {class: "terms meta"}, META.map((name) => element("div", {class: "term"},
            element("dt", {}, fieldLabel(name)), this.#value(step(name), data[name], "dd"))));
        const parties = element("div", {class: "parties"}, this.#party("vendor", data.vendor), this.#party("customer", data.customer));
        const lines = this.#section("/line_items", texts.lines, this.#list("/line_items", data.line_items, LINES));
        const hasTaxes = Array.isArray(data.taxes) ? data.taxes.length > 0 : !isAbsent(data.taxes);
        const isWarned = (pointer) => this.#warnings.some(({field}) => field === pointer || field.startsWith(`${pointer}/`));
        const taxes = (hasTaxes || isWarned("/taxes")) &&
            this.#section("/taxes", texts.taxes, this.#list("/taxes", data.taxes, TAXES));
        const totals = this.#section("/totals", fieldLabel("totals"),
            isAbsent(data.totals) || isRecord(data.totals) ? this.#terms("/totals", data.totals, TOTALS, "totals")
                : this.#value("/totals", data.totals));
        const others = Object.fromEntries(Object.entries(data).filter(([name]) => !PLACED.has(name)));
        const more = Object.keys(others).length > 0 && this.#section(null, texts.more, this.#terms("", others, []));
        const body = [heading, meta, parties, lines, element("div", {class: "sums"}, taxes, totals), more];
        return element("div", {class: "invoice"}, this.#overview(), body);
    }
}

/** data: by exactData(); warnings: as the service gave them. */
export function renderInvoice(data, warnings) {
    const known = (Array.isArray(warnings) ? warnings : []).filter(isRecord)
        .map(({field, detail}) => ({field: String(field ?? ""), detail: String(detail ?? "")}));
    return new Sheet(known).render(isRecord(data) ? data : {});
}
