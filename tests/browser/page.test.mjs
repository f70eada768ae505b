// The page, as somebody uses it: nginx, the pool and the Gemini emulator are real processes.
// Nothing waits for time to pass: where the page does (Retry-After), the browser's clock is moved on.

import assert from "node:assert/strict";
import fs from "node:fs";
import {after, afterEach, before, beforeEach, describe, test} from "node:test";
import {closeBrowser, ctl, emulator, eventually, fits, isAccessible, LOOKS, newCompany, openBrowser, picture, sample, saved, scratch,
    stacks, withPage} from "./support.mjs";

const FAILED = "Failed to process invoice";
const PDF = sample("invoice-de.pdf");
const LIMIT = 50 * 1024 * 1024;
const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/;

before(openBrowser);
after(closeBrowser);
beforeEach(() => emulator.reset());
afterEach(() => emulator.reset()); // lets go of what it holds

// ---- what a user does and sees ----

async function who(page, {company, user = "Anna", branch = "Lyon", key = ""}) {
    await page.getByRole("textbox", {name: "Company"}).fill(company);
    await page.getByRole("textbox", {name: "Your name"}).fill(user);
    await page.getByRole("textbox", {name: "Branch (optional)"}).fill(branch);
    await page.locator("#key").fill(key);
}

const choose = (page, files) => page.locator("#file").setInputFiles(files);
const start = (page) => page.locator("#start").click();
const entry = (page, name) => page.locator(".entry", {has: page.getByRole("heading", {name, exact: true})});
const until = (page, name, ...states) => page.locator(states.map((each) => `.entry[data-state="${each}"]`).join(","))
    .filter({has: page.getByRole("heading", {name, exact: true})}).first().waitFor();
const said = (page) => page.locator("#said").innerText();
const act = (page, name, words) => entry(page, name).getByRole("button", {name: words}).click();
const invoiceText = (invoice) => ({text: JSON.stringify(invoice)});

async function extract(page, company, file = PDF) {
    await who(page, {company});
    await choose(page, file);
    await start(page);
}

function requests(page) {
    const seen = [];
    page.on("request", (request) => {
        if (request.url().endsWith("/extract")) seen.push(request.headers());
    });
    return seen;
}

const pasted = (page) => page.evaluate(() => navigator.clipboard.readText());

function sparse(name, bytes) {
    const file = scratch(name);
    fs.closeSync(fs.openSync(file, "w"));
    fs.truncateSync(file, bytes);
    return file;
}

/** A PDF of that many bytes that takes a while to send. */
function large(name, bytes) {
    const pdf = fs.readFileSync(PDF);
    const file = scratch(name);
    fs.writeFileSync(file, Buffer.concat([pdf.subarray(0, 9), Buffer.from("%".padEnd(bytes - pdf.length - 1, "x") + "\n"), pdf.subarray(9)]));
    return file;
}

async function slowly(page, bytesPerSecond) {
    const session = await page.context().newCDPSession(page);
    await session.send("Network.enable");
    await session.send("Network.emulateNetworkConditions",
        {offline: false, latency: 0, downloadThroughput: -1, uploadThroughput: bytesPerSecond});
    return () => session.send("Network.emulateNetworkConditions", {offline: false, latency: 0, downloadThroughput: -1, uploadThroughput: -1});
}

// ---- the way of an upload ----

describe("an upload", () => {
    test("from the file to the invoice beside its document", () => withPage(async (page) => {
        const {company, key} = newCompany();
        await emulator.script(key, {hold: true});
        await extract(page, company);
        await until(page, "invoice-de.pdf", "waiting");
        assert.match(await entry(page, "invoice-de.pdf").locator(".detail").innerText(), /The invoice is being read \(\d+ s\)/);
        await emulator.wait({held: 1});
        await emulator.release();
        await until(page, "invoice-de.pdf", "done");
        const result = entry(page, "invoice-de.pdf").locator(".invoice");
        const words = await result.innerText();
        for (const value of ["Invoice INV-", "2026-10-01", "Müller & Söhne GmbH", "DE89370400440532013000", "Công ty TNHH Ánh Dương",
            "Kugellager 6204", "95.00", "1249.50"]) assert(words.includes(value), `${value} in ${words}`);
        await entry(page, "invoice-de.pdf").locator("iframe").waitFor();
        const [call] = await emulator.log();
        assert.equal(call.mime, "application/pdf");
        assert.equal(call.file_bytes, fs.statSync(PDF).size);
        const usage = JSON.parse(ctl("open", ["usage", "--company", company, "--by", "user", "--json"]));
        assert.match(JSON.stringify(usage), /Anna/);
        const announced = await said(page);
        for (const line of ["invoice-de.pdf added.", "invoice-de.pdf: uploading.", "invoice-de.pdf: uploaded, being read.",
            "invoice-de.pdf: read."]) assert(announced.includes(line), announced);
    }));

    test("tells how much of it is sent", () => withPage(async (page) => {
        const {company} = newCompany();
        await page.evaluate(() => {
            globalThis.progress = [];
            new MutationObserver(() => {
                const bar = document.querySelector("progress");
                if (bar && !bar.hidden && bar.position >= 0) globalThis.progress.push(bar.value);
            }).observe(document.querySelector("#entries"), {subtree: true, attributes: true, childList: true, characterData: true});
        });
        const quickly = await slowly(page, 2_000_000);
        await extract(page, company, large("large.pdf", 4_000_000));
        await page.waitForFunction(() => globalThis.progress.some((value) => value > 0 && value < 1));
        assert.match(await entry(page, "large.pdf").locator(".detail").innerText(), /^[\d.]+ (bytes|KB|MB) of 3\.8 MB sent$/);
        await quickly();
        await until(page, "large.pdf", "done");
        const steps = await page.evaluate(() => globalThis.progress);
        assert.deepEqual(steps, [...steps].sort((a, b) => a - b));
    }));

    test("cancelled before it is sent whole: nothing is spent, and it can be sent again", () => withPage(async (page) => {
        const {company} = newCompany();
        const seen = requests(page);
        const quickly = await slowly(page, 50_000);
        await extract(page, company, large("large.pdf", 4_000_000));
        await until(page, "large.pdf", "uploading");
        await act(page, "large.pdf", /^Cancel/);
        await until(page, "large.pdf", "stopped");
        assert.match(await entry(page, "large.pdf").innerText(), /Cancelled before it was sent whole. Nothing was used up./);
        await quickly();
        await act(page, "large.pdf", /^Try again/);
        await until(page, "large.pdf", "done");
        assert.equal((await emulator.log()).length, 1);
        assert.equal(new Set(seen.map((headers) => headers["idempotency-key"])).size, 1);
    }));

    test("given up while it is read: asking again tells what became of it, and pays nothing", () => withPage(async (page) => {
        const {company, key} = newCompany();
        await emulator.script(key, {hold: true});
        await extract(page, company);
        await emulator.wait({held: 1});
        await until(page, "invoice-de.pdf", "waiting");
        await act(page, "invoice-de.pdf", /^Stop waiting/);
        await until(page, "invoice-de.pdf", "stopped");
        assert.match(await entry(page, "invoice-de.pdf").innerText(), /The service goes on with this invoice all the same, and it counts/);
        await act(page, "invoice-de.pdf", /^Ask again/);
        await until(page, "invoice-de.pdf", "failed");
        const inProgress = await entry(page, "invoice-de.pdf").locator(".problem").innerText();
        const [, first] = /^A request with this Idempotency-Key is in progress\. Its request_id is ([0-9a-f-]{36})\./.exec(inProgress);
        assert.match(inProgress, /This invoice was sent before and is still being read/);
        await emulator.release();
        await eventually(() => ctl("open", ["usage", "--company", company, "--json"]).includes("RequestCount"), "it is settled");
        await act(page, "invoice-de.pdf", /^Ask again/);
        await page.locator(".problem-detail").getByText(`was processed already. Its request_id is ${first}.`).waitFor();
        assert.match(await entry(page, "invoice-de.pdf").innerText(), /must be read again/);
        assert.equal((await emulator.log()).length, 1);
        await act(page, "invoice-de.pdf", /and pay again/); // that is said plainly, and only then it is
        await until(page, "invoice-de.pdf", "done");
        assert.equal((await emulator.log()).length, 2);
    }));

    test("two clicks pay once", () => withPage(async (page) => {
        const {company, key} = newCompany();
        await emulator.script(key, {hold: true});
        await who(page, {company});
        await choose(page, PDF);
        const seen = requests(page);
        await page.locator("#start").dblclick();
        await emulator.wait({held: 1});
        await start(page);
        assert.equal(await page.locator("#files-error").isVisible(), false);
        await choose(page, PDF); // nor is the same file taken twice
        await page.locator("#files-error").getByText("invoice-de.pdf is in the list already.").waitFor();
        await start(page);
        await emulator.release();
        await until(page, "invoice-de.pdf", "done");
        assert.equal(await page.locator(".entry").count(), 1);
        assert.equal(seen.length, 1);
        assert.match(seen[0]["idempotency-key"], UUID);
        assert.equal((await emulator.log()).length, 1);
    }));

    test("many: two at a time, one after the other, each with a key of its own", () => withPage(async (page) => {
        const {company, key} = newCompany();
        await emulator.always(key, {hold: true});
        const names = ["invoice-de.pdf", "invoice-ja.pdf", "receipt.png", "invoice.jpeg", "invoice.webp", "invoice.heic"];
        const seen = requests(page);
        await who(page, {company});
        await choose(page, names.map(sample));
        await page.getByRole("button", {name: "Read 6 invoices"}).click();
        for (let read = 0; read < names.length; read += 1) {
            await page.locator('.entry[data-state="waiting"]').nth(read < 5 ? 1 : 0).waitFor();
            await emulator.wait({held: read < 5 ? 2 : 1, calls: Math.min(read + 2, 6)});
            assert.equal(seen.length, Math.min(read + 2, 6));
            await emulator.release(1);
            await emulator.wait({finished: read + 1});
            await page.locator('.entry[data-state="done"]').nth(read).waitFor();
        }
        assert.equal(new Set(seen.map((headers) => headers["idempotency-key"])).size, 6);
        assert.equal(await page.locator("#summary").innerText(), "6 read");
        assert.equal(await page.locator(".result:visible").count(), 1); // the first opens by itself
        const all = await saved(page, () => page.locator("#all-csv").click());
        assert.equal(all.name, "invoices.csv");
        assert.equal(all.text.split("\r\n").filter(Boolean).length, 1 + 6 * 2);
        const both = JSON.parse((await saved(page, () => page.locator("#all-json").click())).text);
        assert.deepEqual(both.map(({file}) => file).sort(), [...names].sort());
        assert(both.every(({answer}) => answer.status === "success"));
    }));

    test("dropped, pasted, photographed", () => withPage(async (page) => {
        const transfer = await page.evaluateHandle(() => {
            const data = new DataTransfer();
            data.items.add(new File(["%PDF-1.4"], "dropped.pdf", {type: "application/pdf"}));
            data.items.add(new File(["%PDF-1.4"], "also.pdf", {type: "application/pdf"}));
            return data;
        });
        await page.dispatchEvent("#drop", "dragenter", {dataTransfer: transfer});
        await page.locator("#drop.over").waitFor();
        await page.dispatchEvent("#drop", "drop", {dataTransfer: transfer});
        await page.locator("#drop:not(.over)").waitFor();
        await page.evaluate(() => {
            const data = new DataTransfer();
            data.items.add(new File(["x"], "pasted.png", {type: "image/png"}));
            document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data, bubbles: true}));
        });
        assert.deepEqual(await page.locator(".file-name").allInnerTexts(), ["dropped.pdf", "also.pdf", "pasted.png"]);
        assert.match(await said(page), /2 files added\./);
        assert.equal(await page.locator("#photograph").isVisible(), false); // there is no finger to press it with
        assert.equal(await page.locator("#camera").getAttribute("capture"), "environment");
        await page.locator("#camera").setInputFiles(sample("invoice.jpeg"));
        assert.equal(await page.locator(".entry").count(), 4);
    }));
});

// ---- the document beside it. That Chromium's own viewer has a PDF shows in a frame of an extension ----

describe("the document", () => {
    for (const [name, shown] of [["invoice-de.pdf", "iframe"], ["receipt.png", "img"], ["invoice.jpeg", "img"], ["invoice.webp", "img"],
        ["invoice.heic", ".placeholder"]]) {
        test(`${name} by ${shown}`, () => withPage(async (page) => {
            const {company} = newCompany();
            await extract(page, company, sample(name));
            await until(page, name, "done");
            const frame = entry(page, name).locator(".document-frame");
            await frame.locator(shown).waitFor();
            if (shown === "img") await page.waitForFunction(() => document.querySelector(".document-frame img").naturalWidth > 0);
            if (shown === "iframe") await eventually(() => page.frames().some((each) => each.url().startsWith("chrome-extension:")), "Chromium's viewer");
            if (shown === ".placeholder") assert.match(await frame.innerText(), /This browser cannot show this kind of file\./);
            else await entry(page, name).getByRole("link", {name: "Open in a new tab"}).waitFor();
            await picture(page, `document-${name}`);
        }));
    }

    test("is what its bytes say, never a page", () => withPage(async (page) => {
        const {company} = newCompany();
        const file = scratch("trick.html"); // a PDF to Gemini and to us, a page to who believes its name
        fs.writeFileSync(file, Buffer.concat([fs.readFileSync(PDF), Buffer.from("<script>alert(1)</script>")]));
        await extract(page, company, file);
        await until(page, "trick.html", "done");
        const [opened] = await Promise.all([page.context().waitForEvent("page"), entry(page, "trick.html").getByRole("link").click()]);
        await eventually(() => opened.frames().some((each) => each.url().startsWith("chrome-extension:")), "Chromium's viewer");
        assert.equal(await opened.evaluate(() => document.contentType), "application/pdf");
    }));
});

// ---- what was read ----

const WRONG = {
    document_type: "invoice", invoice_number: "=1+1", issue_date: "2026-10-01", due_date: null, currency: "EUR", purchase_order: null,
    payment_terms: "30 days, net; \"strict\"", colour: "red",
    vendor: {name: "<img src=x onerror=alert(1)>", tax_id: "@SUM(A1)", registration_id: null, address: "\tTab 1", email: null,
        iban: "DE00370400440532013000", bic: null},
    customer: {name: "Café \"Zur Post\", Wien", tax_id: "+43 1 234", address: "Line 1\r\nLine 2"},
    line_items: [
        {description: "-discount", product_code: null, quantity: 2, unit: "pcs", unit_price: "50.10", tax_rate: "19", tax_amount: null, amount: "-100.20"},
        {description: "\rcarriage", product_code: "A-1", quantity: "1", unit: null, unit_price: "0.10", tax_rate: null, tax_amount: null, amount: "0.10"},
    ],
    taxes: [{rate: "19", base: "100.00", amount: "19.00"}],
    totals: {subtotal: "100.30", discount: null, tax: "19.00", total: "120.00", amount_paid: null, amount_due: "12345678901234567890.10"},
};

async function readWrong(page) {
    const {company, key} = newCompany();
    await emulator.script(key, invoiceText(WRONG));
    const answer = page.waitForResponse((response) => response.url().endsWith("/extract"));
    await extract(page, company);
    await until(page, "invoice-de.pdf", "done");
    return (await answer).text();
}

describe("what was read", () => {
    test("each warning stands at its field", () => withPage(async (page) => {
        const {warnings} = JSON.parse(await readWrong(page));
        assert.deepEqual(warnings.map(({field}) => field).sort(),
            ["/colour", "/line_items/0/quantity", "/totals/subtotal", "/totals/total", "/vendor/iban"]);
        const list = page.locator(".warnings");
        assert.match(await list.innerText(), /^5 things to check/);
        for (const {detail} of warnings) assert((await list.innerText()).includes(detail));
        const at = (selector) => page.locator(`.invoice ${selector} .warning`).allTextContents();
        const detail = (field) => warnings.filter((warning) => warning.field === field).map((warning) => `To check: ${warning.detail}`);
        assert.deepEqual(await at(".totals .term-subtotal dd"), detail("/totals/subtotal"));
        assert.deepEqual(await at(".totals .term-total dd"), detail("/totals/total"));
        assert.deepEqual(await at(".parties .term-iban dd"), detail("/vendor/iban"));
        assert.deepEqual(await at("tbody tr:first-child td.number"), detail("/line_items/0/quantity"));
        assert.equal(await page.locator(".invoice .warning").count(), 4);
        await list.getByRole("button", {name: "From › IBAN"}).click();
        assert.match(await page.evaluate(() => document.activeElement.innerText), /DE00370400440532013000/);
        assert.match(await said(page), /invoice-de\.pdf: read, 5 to check\./);
        assert.match(await page.locator(".invoice").innerText(), /<img src=x onerror=alert\(1\)>/); // text stays text
    }));

    test("JSON, to the byte", () => withPage(async (page) => {
        const body = await readWrong(page);
        const json = await saved(page, () => act(page, "invoice-de.pdf", /^Download JSON/));
        assert.deepEqual(json, {name: "invoice-de.json", text: `${body.trim()}\n`});
        await act(page, "invoice-de.pdf", /^Copy JSON/);
        await page.locator("#said").getByText("Copied.").waitFor();
        assert.equal(await pasted(page), `${body.trim()}\n`);
    }));

    test("CSV, with nothing in it that a spreadsheet takes for a formula", () => withPage(async (page) => {
        const {request_id: id} = JSON.parse(await readWrong(page));
        const csv = await saved(page, () => act(page, "invoice-de.pdf", /^Download CSV/));
        const head = "file,request_id,document_type,invoice_number,issue_date,due_date,currency,purchase_order,payment_terms," +
            "vendor.name,vendor.tax_id,vendor.registration_id,vendor.address,vendor.email,vendor.iban,vendor.bic," +
            "customer.name,customer.tax_id,customer.address,taxes.1.rate,taxes.1.base,taxes.1.amount," +
            "totals.subtotal,totals.discount,totals.tax,totals.total,totals.amount_paid,totals.amount_due," +
            "line,line.description,line.product_code,line.quantity,line.unit,line.unit_price,line.tax_rate,line.tax_amount,line.amount";
        const first = `invoice-de.pdf,${id},invoice,'=1+1,2026-10-01,,EUR,,"30 days, net; ""strict""",` +
            "<img src=x onerror=alert(1)>,'@SUM(A1),,\"'\tTab 1\",,DE00370400440532013000,," +
            "\"Café \"\"Zur Post\"\", Wien\",'+43 1 234,\"Line 1\r\nLine 2\",19,100.00,19.00,100.30,,19.00,120.00,,12345678901234567890.10";
        const expected = `${head}\r\n${first},1,'-discount,,2,pcs,50.10,19,,-100.20\r\n${first},2,"'\rcarriage",A-1,1,,0.10,,,0.10\r\n`;
        assert.deepEqual(csv, {name: "invoice-de.csv", text: `\ufeff${expected}`});
        await act(page, "invoice-de.pdf", /^Copy CSV/);
        await page.locator("#said").getByText("Copied.").waitFor();
        assert.equal(await pasted(page), expected);
    }));

    test("fields of somebody's own schema, and invoices with next to nothing in them", () => withPage(async (page) => {
        const words = await page.evaluate(async () => {
            const {renderInvoice} = await import("/extract-fcgi/invoice.js");
            const {exactData, toCsv} = await import("/extract-fcgi/export.js");
            const text = '{"request_id": "r", "data": {"delivery_note": "L-1", "weights": [1.50, 2], "constructor": "c", "vendor": "Acme", ' +
                '"stops": [{"place": "Lyon", "at": {"hour": 7}}], "line_items": null, "is_paid": true}}';
            const node = renderInvoice(exactData(text), [{field: "/stops/0/at/hour", detail: "Early."}, {field: "", detail: "All of it."}]);
            const nothing = [{}, null, [], "x", {line_items: [], taxes: {}, totals: []}].map((data) => renderInvoice(data, null).textContent);
            document.body.append(node);
            return {shown: node.innerText, csv: toCsv([{file: "f", text}]), nothing};
        });
        for (const value of ["Delivery note\nL-1", "1.50", "Lyon", "Acme", "yes", "Early.", "All of it.", "None were read."])
            assert(words.shown.includes(value), `${value} in ${words.shown}`);
        assert.equal(words.csv, "file,request_id,delivery_note,weights.1,weights.2,constructor,vendor,stops.1.place,stops.1.at.hour,is_paid\r\n" +
            "f,r,L-1,1.50,2,c,Acme,Lyon,7,true\r\n");
        assert.equal(words.nothing.length, 5);
    }));
});

// ---- what goes wrong ----

const problems = [
    {name: "token_expired", detail: "Your AI token has expired. Please renew your subscription.", again: "Try again",
        make: () => {
            const made = newCompany();
            ctl("open", ["token", "set-status", made.token, "Expired"]);
            return made;
        }},
    {name: "token_unavailable", detail: "Your AI token is no longer available or has been disabled. Please contact support.", again: "Try again",
        make: () => {
            const made = newCompany();
            ctl("open", ["token", "set-status", made.token, "Disabled"]);
            return made;
        }},
    {name: "token_unavailable, the token turned out to be at fault", scenario: "invalid_key", again: "Try again",
        detail: "Your AI token is no longer available or has been disabled. Please contact support."},
    {name: "no_active_token", detail: "No active token found for your company. Please contact support.", again: "Try again",
        make: () => ({company: "nobody's"})},
    {name: "invalid_file, damaged", detail: FAILED, file: () => {
        const file = scratch("damaged.pdf");
        fs.writeFileSync(file, fs.readFileSync(PDF).subarray(0, 3000));
        return file;
    }, advice: /damaged/, spent: false},
    {name: "invalid_file, empty", detail: FAILED, file: () => sparse("empty.pdf", 0), advice: /empty/, spent: false},
    {name: "invalid_file, refused by Gemini", detail: FAILED, scenario: "safety", spent: true},
    {name: "invalid_file, blocked", detail: FAILED, scenario: "blocked", spent: true},
    {name: "unsupported_media_type", detail: FAILED, file: () => {
        const file = scratch("letter.txt");
        fs.writeFileSync(file, "Dear Sirs,");
        return file;
    }, advice: /kind of file cannot be read/, spent: false},
    {name: "upstream_unavailable", detail: FAILED, scenario: "overloaded", again: "Try again", retries: 30, spent: false},
    {name: "upstream_rejected", detail: FAILED, scenario: "model_not_found", advice: /not set up right/, again: "Try again", spent: false},
    {name: "invalid_answer", detail: FAILED, scenario: "bad_json", again: "Read it again, and pay again", spent: true},
    {name: "upstream_rate_limited", again: "Try again", wait: /^Possible again in 10 min\.$/,
        detail: "All AI tokens of your company are at their rate limit. Please try again later.",
        steps: [{status: 429, retry_delay: "600s"}]},
    {name: "deadline_exceeded", stack: "late", detail: "The request took longer than its deadline allows.", again: "Try again", retries: 1, spent: false},
    {name: "store_unavailable", stack: "away", make: () => ({company: "NT047"}), again: "Try again", retries: 10, spent: false,
        detail: "The token store cannot be reached. Please try again later."},
    {name: "overloaded", stack: "dead", make: () => ({company: "NT047"}), detail: "The service is overloaded or not running.",
        again: "Try again", retries: 5, spent: false},
    {name: "unauthenticated", stack: "bearer", detail: "A valid client key is required.", advice: /Check the client key/, again: "Try again"},
];

describe("what goes wrong is said to the letter, with its number and what to do", () => {
    for (const {name, stack = "open", detail, make, scenario, steps, file, again, retries, wait, spent = false, advice} of problems) {
        test(name, () => withPage(async (page) => {
            const {company, key} = make ? make() : newCompany(stack);
            if (scenario) await emulator.scenario(key, scenario);
            if (steps) await emulator.always(key, ...steps);
            await page.clock.install();
            const seen = requests(page);
            const path = file ? file() : PDF;
            const base = path.split("/").at(-1);
            await extract(page, company, path);
            const problem = entry(page, base).locator(".problem");
            for (let turn = 1; retries && turn <= 3; turn += 1) { // by itself, and not before it is due
                await page.locator('.entry[data-state="delayed"] .detail').getByText(`(${turn} of 3)`).waitFor();
                const [, seconds] = /again in (\d+) s/.exec(await entry(page, base).locator(".detail").innerText());
                assert(seconds <= (retries === 1 ? turn * 2 : retries) && seconds > 0, seconds);
                assert.equal(await problem.locator(".problem-detail").innerText(), detail);
                assert.equal(seen.length, turn);
                await page.clock.fastForward(seconds * 1000 + 1000);
            }
            await until(page, base, "failed");
            assert.equal(await problem.locator(".problem-detail").innerText(), detail);
            const requestId = await problem.locator("code").innerText();
            assert.match(requestId, stack === "dead" ? /^[0-9a-f]{32}$/ : UUID);
            if (wait) assert.match(await entry(page, base).locator(".detail").innerText(), wait);
            if (advice) assert.match(await problem.innerText(), advice);
            assert.match(await problem.innerText(), spent ? /Tokens were used up, or may have been\./ : /Nothing was used up\./);
            await problem.getByRole("button", {name: "Copy the request ID"}).click();
            await page.locator("#said").getByText("Copied.").waitFor();
            assert.equal(await pasted(page), requestId);
            assert((await said(page)).includes(`${base}: not read. ${detail}`));
            const buttons = (await entry(page, base).getByRole("button").allInnerTexts()).filter((words) => words !== "⧉");
            assert.deepEqual(buttons, again ? [again, "Remove"] : ["Remove"]);
            assert.equal(seen.length, retries ? 4 : 1);
            assert.equal(new Set(seen.map((headers) => headers["idempotency-key"])).size, 1);
            await picture(page, `problem-${name.replaceAll(/\W+/g, "-")}`);
        }, {stack}));
    }

    test("rate_limited: sent again when Retry-After is over, and read", () => withPage(async (page) => {
        const {company, key} = newCompany("share");
        await emulator.script(key, {hold: true});
        await page.clock.install();
        await who(page, {company});
        await choose(page, [PDF, sample("receipt.png")]);
        await start(page);
        await page.locator('.entry[data-state="delayed"]').waitFor();
        const delayed = page.locator('.entry[data-state="delayed"]');
        assert.equal(await delayed.locator(".problem-detail").innerText(), "Too many requests. Please try again later.");
        assert.match(await delayed.locator(".detail").innerText(), /^It will be sent again in [45] s \(1 of 3\)\. Nothing was used up\.$/);
        await emulator.wait({held: 1});
        await emulator.release();
        await page.locator('.entry[data-state="done"]').waitFor();
        assert.equal(await delayed.count(), 1);
        await page.clock.fastForward(6000);
        await page.locator('.entry[data-state="done"]').nth(1).waitFor();
    }, {stack: "share"}));

    test("a retry that waits can be called off, and then keeps to Retry-After", () => withPage(async (page) => {
        await page.clock.install();
        const seen = requests(page);
        await extract(page, "NT047");
        await until(page, "invoice-de.pdf", "delayed");
        await act(page, "invoice-de.pdf", /^Cancel/);
        await until(page, "invoice-de.pdf", "failed");
        const again = entry(page, "invoice-de.pdf").getByRole("button", {name: /^Try/});
        assert.equal(await again.getAttribute("aria-disabled"), "true");
        await again.focus();
        await page.keyboard.press("Enter");
        assert.match(await said(page), /Possible again in [1-5] s\./);
        assert.equal(seen.length, 1);
        await page.clock.fastForward(7000);
        await page.locator(".entry button:not([aria-disabled])", {hasText: "Try again"}).click();
        await until(page, "invoice-de.pdf", "delayed");
        assert.equal(seen.length, 2);
        assert.equal(seen[0]["idempotency-key"], seen[1]["idempotency-key"]);
    }, {stack: "dead"}));

    test("token_busy", () => withPage(async (page) => {
        const {company, key} = newCompany("open", "--limit", "9000");
        await emulator.script(key, {hold: true});
        await page.clock.install();
        await who(page, {company});
        await choose(page, [PDF, sample("receipt.png")]);
        await start(page);
        const busy = page.locator('.entry[data-state="delayed"] .problem-detail');
        assert.equal(await busy.innerText(), "The rest of your token's limit is held by requests in progress. Please try again shortly.");
        await emulator.wait({held: 1});
        await emulator.release();
        await page.locator('.entry[data-state="done"]').waitFor();
        await page.clock.fastForward(12_000);
        await until(page, await page.locator(".entry .file-name").last().innerText(), "done", "failed");
    }));

    test("forbidden, then with the right key", () => withPage(async (page) => {
        const {company} = newCompany("bearer");
        const other = newCompany("bearer");
        const clientKey = (of) => /extract_[\w-]{43}/.exec(ctl("bearer", ["client-key", "add", "--company", of]))[0];
        await who(page, {company, key: clientKey(other.company)});
        await choose(page, PDF);
        await start(page);
        await until(page, "invoice-de.pdf", "failed");
        assert.match(await entry(page, "invoice-de.pdf").innerText(), /The client key does not belong to this company\./);
        await page.locator("#key").fill(clientKey(company));
        await act(page, "invoice-de.pdf", /^Try/);
        await until(page, "invoice-de.pdf", "done");
    }, {stack: "bearer"}));

    test("a process that dies: the outcome is unknown, asking is safe", () => withPage(async (page) => {
        const {company, key} = newCompany("mortal");
        await emulator.script(key, {hold: true});
        await extract(page, company);
        await emulator.wait({held: 1});
        for (const pid of stacks.mortal.pids) process.kill(pid, "SIGKILL");
        await until(page, "invoice-de.pdf", "failed");
        const words = await entry(page, "invoice-de.pdf").innerText();
        assert.match(words, /The service broke off while it worked on the request; the outcome is unknown\./);
        assert.match(words, /it is never paid for twice/);
        assert.equal(await entry(page, "invoice-de.pdf").getByRole("button", {name: /^Ask again/}).isVisible(), true);
    }, {stack: "mortal"}));

    test("an answer that is nobody's, and a connection that breaks", () => withPage(async (page) => {
        const {company} = newCompany();
        await page.route("**/extract", (route) => route.fulfill({status: 502, contentType: "text/html", body: "<h1>Bad Gateway</h1>"}));
        await extract(page, company);
        await until(page, "invoice-de.pdf", "failed");
        assert.match(await entry(page, "invoice-de.pdf").innerText(), /Something other than the service answered \(HTTP 502\)\./);
        await page.unroute("**/extract");
        await page.route("**/extract", (route) => route.abort("connectionreset"));
        await act(page, "invoice-de.pdf", /^Ask again/);
        await entry(page, "invoice-de.pdf").getByText(/The connection broke/).waitFor();
        await page.unroute("**/extract");
        await act(page, "invoice-de.pdf", /^(Ask|Try)/);
        await until(page, "invoice-de.pdf", "done");
    }));

    test("too large: not sent at all", () => withPage(async (page) => {
        const seen = requests(page);
        assert.match(await page.locator("#files-hint").innerText(), /Up to 50 MB each\./);
        await who(page, {company: "NT047"});
        await choose(page, sparse("huge.pdf", LIMIT + 1));
        await until(page, "huge.pdf", "failed");
        assert.match(await entry(page, "huge.pdf").innerText(),
            /This file makes an upload of 50 MB \(52428801 bytes\), and the limit is 50 MB \(52428800 bytes\)\. It was not sent\./);
        await choose(page, sparse("edge.pdf", LIMIT - 100)); // with the rest of the form it is over
        await start(page);
        await until(page, "edge.pdf", "failed");
        assert.match(await entry(page, "edge.pdf").innerText(), /It was not sent\./);
        assert.deepEqual(seen, []);
    }));

    test("too large where the page was not told: what nginx says", () => withPage(async (page) => {
        await page.route("**/settings.json", (route) => route.fulfill({status: 200, body: "{}"}));
        await page.reload();
        await extract(page, "NT047", sparse("huge.pdf", LIMIT + 1));
        await until(page, "huge.pdf", "failed");
        assert.equal(await page.locator(".problem-detail").innerText(), "The upload is larger than the limit of 50 MB (52428800 bytes).");
    }));
});

// ---- the form ----

describe("the form", () => {
    test("says what is missing where it is missing", () => withPage(async (page) => {
        await start(page);
        assert.equal(await page.locator("#company-error").innerText(), "Company is missing.");
        assert.equal(await page.locator("#user-error").innerText(), "Your name is missing.");
        assert.equal(await page.evaluate(() => document.activeElement.id), "company");
        assert.equal(await page.locator("#company").getAttribute("aria-invalid"), "true");
        await page.locator("#company").fill("Ü".repeat(129));
        assert.equal(await page.locator("#company-error").innerText(), "Company is too long: at most 256 bytes.");
        await page.locator("#company").fill("  NT047 ");
        assert.equal(await page.locator("#company-error").isVisible(), false);
        await page.locator("#user").fill("Anna");
        await page.locator("#key").fill("ключ");
        await start(page);
        assert.equal(await page.locator("#key-error").innerText(), "It holds a character that no client key has.");
        await page.locator("#key").fill("");
        await start(page);
        assert.equal(await page.locator("#files-error").innerText(), "Choose an invoice first.");
        assert.equal(await page.evaluate(() => document.activeElement.id), "choose");
    }));

    const kept = (page) => page.evaluate(() => Object.fromEntries(Object.entries(localStorage)));

    test("remembers only what it is told to, and forgets", () => withPage(async (page) => {
        const {company} = newCompany();
        await extract(page, company);
        await until(page, "invoice-de.pdf", "done");
        await page.locator("#key").fill("secret-key");
        assert.deepEqual(await kept(page), {});
        await page.getByLabel("Remember company, name and branch").check();
        const names = {company, user: "Anna", branch: "Lyon"};
        assert.deepEqual(await kept(page), {"extract-fcgi.who": JSON.stringify(names)});
        await page.locator("#branch").fill("Nantes");
        await page.reload();
        const values = () => page.locator("#form input:not([type=checkbox]):not([type=file])").evaluateAll((all) => all.map(({value}) => value));
        await page.locator("html[data-ready]").waitFor();
        assert.deepEqual(await values(), [company, "Anna", "Nantes", ""]);
        await page.locator("#key").fill("secret-key");
        await page.getByLabel("Remember the client key, too").check();
        await page.getByLabel("Remember company, name and branch").uncheck();
        assert.deepEqual(await kept(page), {"extract-fcgi.client-key": "secret-key"});
        await page.reload();
        await page.locator("html[data-ready]").waitFor();
        assert.deepEqual(await values(), ["", "", "", "secret-key"]);
        await page.getByRole("button", {name: "Forget everything"}).click();
        assert.deepEqual(await kept(page), {});
        assert.deepEqual(await values(), ["", "", "", ""]);
        assert.equal(await page.getByLabel("Remember the client key, too").isChecked(), false);
        assert.match(await said(page), /Forgotten: nothing is kept/);
        await page.reload();
        await page.locator("html[data-ready]").waitFor();
        assert.deepEqual(await values(), ["", "", "", ""]);
        assert.deepEqual(await page.context().cookies(), []);
    }));

    test("does not let go of the page while something is under way", () => withPage(async (page) => {
        const {company, key} = newCompany();
        await emulator.script(key, {hold: true});
        await extract(page, company);
        await emulator.wait({held: 1});
        const asked = page.waitForEvent("dialog");
        const leaving = page.evaluate(() => location.reload()).catch(() => {});
        const dialog = await asked;
        assert.equal(dialog.type(), "beforeunload");
        await dialog.dismiss();
        await leaving;
        await emulator.release();
        await until(page, "invoice-de.pdf", "done");
    }));
});

// ---- for everybody ----

test("the keyboard alone", () => withPage(async (page) => {
    const {company} = newCompany();
    const chooser = page.waitForEvent("filechooser"); // asked for early: Playwright catches it only once the browser has been told
    const focused = () => page.evaluate(() => document.activeElement.id || document.activeElement.getAttribute("aria-label"));
    const tabTo = async (what) => {
        const passed = [];
        while (await focused() !== what) {
            passed.push(await focused());
            assert(passed.length < 40, `${what} is not reached: ${passed}`);
            await page.keyboard.press("Tab");
        }
    };
    await tabTo("company");
    await page.keyboard.type(company);
    await page.keyboard.press("Tab");
    await page.keyboard.type("Anna");
    await tabTo("remember");
    await page.keyboard.press("Space");
    await tabTo("choose");
    await page.keyboard.press("Enter");
    await (await chooser).setFiles(PDF);
    await tabTo("start");
    await page.keyboard.press("Enter");
    await until(page, "invoice-de.pdf", "done");
    assert.equal(await focused(), "start"); // nothing takes it away
    await tabTo("Hide: invoice-de.pdf");
    await page.keyboard.press("Enter");
    await page.keyboard.press("Enter");
    await tabTo("Copy JSON: invoice-de.pdf");
    await page.keyboard.press("Enter");
    await page.locator("#said").getByText("Copied.").waitFor();
    await tabTo("Lines"); // a table that is wider than its place can be moved
    await choose(page, sample("receipt.png"));
    await entry(page, "invoice-de.pdf").getByRole("button", {name: "Remove"}).focus();
    await page.keyboard.press("Enter");
    assert.equal(await page.evaluate(() => document.activeElement.innerText), "receipt.png");
    await entry(page, "receipt.png").getByRole("button", {name: "Remove"}).focus();
    await page.keyboard.press("Enter");
    assert.equal(await focused(), "choose");
    assert.equal(await page.locator("#queue").isVisible(), false);
}));

test("a button that goes takes the focus nowhere", () => withPage(async (page) => {
    const {company, key} = newCompany();
    await emulator.script(key, {hold: true});
    await extract(page, company);
    await emulator.wait({held: 1});
    await until(page, "invoice-de.pdf", "waiting");
    await entry(page, "invoice-de.pdf").getByRole("button", {name: /^Stop/}).focus();
    await page.keyboard.press("Enter");
    assert.equal(await page.evaluate(() => document.activeElement.getAttribute("aria-label")), "Ask again: invoice-de.pdf");
}));

for (const look of LOOKS) {
    test(`accessible and in its place: ${look.name}`, () => withPage(async (page) => {
        const looksRight = async (name) => {
            await picture(page, `${name}-${look.name}`);
            await isAccessible(page);
            await fits(page);
        };
        assert.equal(await page.locator("#photograph").isVisible(), look.viewport.width < 500);
        await looksRight("empty");
        await start(page);
        await looksRight("mistakes");
        const {company, key} = newCompany();
        await emulator.script(key, invoiceText(WRONG), {hold: true}, {finish_reason: "SAFETY", parts: []});
        await extract(page, company);
        await until(page, "invoice-de.pdf", "done");
        await looksRight("warnings");
        await entry(page, "invoice-de.pdf").getByRole("button", {name: "Hide"}).click();
        await choose(page, sample("invoice.jpeg"));
        await start(page);
        await emulator.wait({held: 1});
        await until(page, "invoice.jpeg", "waiting");
        await choose(page, [sample("receipt.png"), sparse("huge.pdf", LIMIT + 1)]);
        await looksRight("waiting");
        await start(page);
        await until(page, "receipt.png", "failed");
        const quickly = await slowly(page, 20_000);
        await choose(page, large("large.pdf", 4_000_000));
        await start(page);
        await entry(page, "large.pdf").locator(".detail").getByText(/ of 3\.8 MB sent/).waitFor();
        await looksRight("everything");
        await act(page, "large.pdf", /^Cancel/);
        await quickly();
        await emulator.release();
        await until(page, "invoice.jpeg", "done");
        await looksRight("picture");
    }, {look, isMobile: look.viewport.width < 500}));
}

test("a page that goes out nowhere", () => withPage(async (page, context) => {
    const elsewhere = [];
    context.on("request", (request) => {
        const isTheBrowsers = !/^(https?|wss?):/.test(request.url()); // chrome: of its viewer, blob:
        if (!isTheBrowsers && !request.url().startsWith(stacks.open.url)) elsewhere.push(request.url());
    });
    await page.reload();
    const {company} = newCompany();
    await extract(page, company);
    await until(page, "invoice-de.pdf", "done");
    assert.deepEqual(elsewhere, []);
}));
