// The dashboard, as an administrator uses it: its figures against the store, by what extractctl says of the same.

import assert from "node:assert/strict";
import {execFileSync} from "node:child_process";
import fs from "node:fs";
import {after, afterEach, before, beforeEach, describe, test} from "node:test";
import {closeBrowser, ctl, emulator, eventually, fits, isAccessible, LOOKS, newCompany, openBrowser, picture, sample, saved, stacks,
    withPage} from "./support.mjs";

const PDF = fs.readFileSync(sample("invoice-de.pdf"));
const DAY = 86_400_000;
const at = {path: "/dashboard"};
const grouped = (value) => new Intl.NumberFormat("en").format(value);

let key;

before(openBrowser);
before(() => {
    key = ctl("open", ["client-key", "add", "--admin"]).trim();
});
after(closeBrowser);
beforeEach(() => emulator.reset());
afterEach(() => emulator.reset());

// ---- what there is to see ----

function sql(statement) {
    return execFileSync("sqlite3", ["-json", "-cmd", ".timeout 30000", stacks.open.env.EXTRACT_STORE_PATH, statement], {encoding: "utf8"});
}

const quoted = (text) => `'${text.replaceAll("'", "''")}'`;
const ago = (days) => new Date(Date.now() - days * DAY).toISOString();

/** Rows of usage, as settlements leave them. */
function use(company, used) {
    for (const {branch = "Lyon", user = "Anna", tokens, days = 0} of used)
        sql(`INSERT INTO TokenUsageLogs (CompanyID, Branch, RequestedBy, InputTokens, OutputTokens, TotalTokensUsed, RequestCount, LoggedAt, TokenSource)
            VALUES (${[company, branch, user].map(quoted)}, ${tokens - 1}, 1, ${tokens}, 1, ${quoted(ago(days))}, 'store')`);
}

async function extract(page, company, {user = "Anna", branch = "Lyon"} = {}) {
    return page.request.post(`${stacks.open.url}/extract`, {multipart: {companyID: company, username: user, branch,
        file: {name: "invoice.pdf", mimeType: "application/pdf", buffer: PDF}}});
}

// ---- what an administrator does and sees ----

async function ask(page, {company = "", period, as = key} = {}) {
    await page.locator("#key").fill(as);
    await page.locator("#company").fill(company);
    if (period) await page.locator("#period").selectOption(period);
    await page.getByRole("button", {name: "Show"}).click();
}

async function show(page, asking) {
    await ask(page, asking);
    await page.locator("#panels:not([aria-busy])").waitFor();
    await page.locator("#status").getByText(/^As of /).waitFor();
}

/** The rows of a panel's table, by the words of its columns. */
async function rows(page, panel) {
    return page.locator(`#${panel} table:not(.u-legend)`).evaluateAll((tables) => tables.flatMap((table) => {
        const names = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
        return [...table.tBodies[0].rows].map((row) => Object.fromEntries([...row.cells].map((cell, i) => [names[i], cell.textContent])));
    }));
}

const card = (page, name) => page.locator(`[data-card="${name}"] dd`).innerText();

const usage = (company, by) => JSON.parse(ctl("open", ["usage", "--company", company, "--by", by, "--json"]));

const COLUMNS = {Requests: "Requests", RequestCount: "Calls", InputTokens: "Input", OutputTokens: "Output", TotalTokensUsed: "Tokens"};
const sums = (row) => Object.fromEntries(Object.entries(COLUMNS).map(([name, words]) => [words, grouped(row[name])]));

describe("its figures are the store's", () => {
    test("usage by day, company, branch, user and token; the tokens; at a glance", () => withPage(async (page) => {
        const {company, token} = newCompany("open", "--limit", "100000", "--threshold", "0.01");
        use(newCompany().company, [{tokens: 12_345}]); // another's, which is not to be seen
        for (const who of [{}, {user: "Bert"}, {branch: "Nantes", user: "Bert"}]) assert.equal((await extract(page, company, who)).status(), 200);
        use(company, [{tokens: 5000, days: 3}, {tokens: 700, days: 3, user: "Bert"}, {tokens: 90, days: 5, branch: ""}]);
        await show(page, {company});

        const pick = (row, ...names) => Object.fromEntries(Object.entries(row).filter(([name]) => names.includes(name) || Object.values(COLUMNS).includes(name)));
        await page.locator("#time summary").click();
        const days = usage(company, "day");
        assert.equal(days.length, 3);
        assert.deepEqual((await rows(page, "time")).map((row) => pick(row, "Day")).sort((a, b) => a.Day.localeCompare(b.Day)),
            days.map((row) => ({Day: row.Day, ...sums(row)})).sort((a, b) => a.Day.localeCompare(b.Day)));
        const total = days.reduce((sum, row) => sum + row.TotalTokensUsed, 0);
        assert.match(await page.locator("#time .plot").getAttribute("aria-label"), new RegExp(`^${grouped(total)} tokens in 6 requests on 3 days\\.$`));

        for (const [by, columns] of [["company", {Company: "CompanyID"}], ["branch", {Branch: "Branch"}], ["user", {User: "RequestedBy"}],
            ["token", {Token: "TokenID", Source: "TokenSource"}]]) {
            const reading = page.waitForResponse((response) => response.url().includes(`by=${by}`));
            await page.locator("#by").selectOption(by);
            if (by !== "company") await reading;
            const [first] = Object.keys(columns);
            await page.locator("#share th").getByText(first, {exact: true}).waitFor();
            const line = (row) => JSON.stringify(row);
            assert.deepEqual((await rows(page, "share")).map((row) => pick(row, ...Object.keys(columns))).map(line).sort(),
                usage(company, by).map((row) => ({...Object.fromEntries(Object.entries(columns).map(([words, name]) =>
                    [words, row[name] === null ? "" : String(row[name])])), ...sums(row)})).map(line).sort(), by);
        }

        const [stored] = JSON.parse(sql(`SELECT * FROM TokenUsageSummary WHERE TokenID = ${token}`));
        const [shown] = await rows(page, "tokens");
        assert.equal(shown.Status, "Activeover its threshold");
        assert.equal(shown.Token, token);
        assert.equal(shown.Used, `${grouped(stored.TotalUsedTokens)} of 100,000`);
        assert.equal(shown.Remaining, grouped(stored.TotalRemainingTokens));
        assert.match(shown.Key, /[0-9a-f]{4}$/);
        assert.equal(await card(page, "active"), "1");
        assert.equal(await card(page, "over"), "1");
        assert.equal(await card(page, "used"), `${grouped(stored.TotalUsedTokens)} of 100,000`);
        assert.equal(await card(page, "remaining"), grouped(stored.TotalRemainingTokens));
        assert.equal(await card(page, "unsettled"), "0");
        assert.equal(await card(page, "waiting"), "0");
        assert.equal(await card(page, "dead"), "0");
    }, at));

    test("what failed: errors, attempts, what is unsettled, a token that cools down", () => withPage(async (page) => {
        const {company, key: apiKey, token} = newCompany();
        await emulator.always(apiKey, {close: "after_read"});
        const {request_id: id} = await (await extract(page, company)).json();
        await eventually(() => sql(`SELECT 1 FROM RetryAttempts WHERE RequestID = '${id}' LIMIT 1 OFFSET 3`), "four attempts");
        sql(`INSERT INTO ApplicationLogs (Timestamp, LogLevel, Logger, Message, Exception, RequestID, Host)
            VALUES (${quoted(ago(0))}, 'ERROR', 'tests', 'It broke <b>', 'for a reason', '${id}', 'here')`);
        sql(`UPDATE TokenMaster SET CooldownUntil = '2999-01-02T03:04:05.000Z' WHERE TokenID = ${token}`);
        await show(page, {company});
        const stored = JSON.parse(sql(`SELECT * FROM RetryAttempts WHERE RequestID = '${id}' ORDER BY RetryID DESC`));
        assert.deepEqual((await rows(page, "retries")).map((row) => [row.Attempt, row.Error, row.Request, row.Token, row.Retryable]),
            stored.map((row) => [String(row.Attempt), row.ErrorMessage, id, token, "yes"]));
        const [unsettled] = await rows(page, "unsettled");
        assert.deepEqual([unsettled.Request, unsettled.User, unsettled.Branch, unsettled.State], [id, "Anna", "Lyon", "unsettled"]);
        assert.equal(await card(page, "unsettled"), "1");
        assert.equal(await card(page, "cooling"), "1");
        assert.equal((await rows(page, "tokens"))[0].Status, "Activecools down until 2999-01-02 03:04:05");
        await show(page, {}); // log entries have no company
        const broke = (await rows(page, "errors")).filter((row) => row.Request === id && row.Message === "It broke <b>");
        assert.deepEqual(broke.map(({Level, Cause, Host}) => [Level, Cause, Host]), [["ERROR", "for a reason", "here"]]);
    }, at));

    test("by period", () => withPage(async (page) => {
        const {company} = newCompany();
        use(company, [{tokens: 1, days: 0.5}, {tokens: 10, days: 3}, {tokens: 100, days: 20}, {tokens: 1000, days: 60}, {tokens: 10_000, days: 200}]);
        const tokens = async () => (await rows(page, "share")).map((row) => row.Tokens);
        for (const [period, total] of [["24h", "1"], ["7d", "11"], ["30d", "111"], ["90d", "1,111"]]) {
            await show(page, {company, period});
            assert.deepEqual(await tokens(), [total]);
        }
        await page.locator("#period").selectOption("dates");
        await page.locator("#from").fill(ago(201).slice(0, 10));
        await page.locator("#to").fill(ago(20).slice(0, 10)); // that day is in it
        await show(page, {company});
        assert.deepEqual(await tokens(), ["11,100"]);
        await page.locator("#to").fill("2020-01-01");
        await ask(page, {company});
        assert.equal(await page.locator("#dates-error").innerText(), "Give both dates, the earlier one first.");
    }, at));
});

test("its plots are drawn, in both schemes", () => withPage(async (page) => {
    const {company} = newCompany();
    use(company, [{tokens: 5000, days: 3}, {tokens: 700, days: 5}]);
    await show(page, {company});
    for (const colorScheme of ["light", "dark"]) {
        await page.emulateMedia({colorScheme});
        for (const panel of ["time", "share"]) {
            await eventually(() => page.locator(`#${panel} canvas`).evaluate((canvas) => {
                const accent = getComputedStyle(document.documentElement).getPropertyValue("--accent").trim();
                const [r, g, b] = [1, 3, 5].map((i) => Number.parseInt(accent.slice(i, i + 2), 16));
                const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
                let count = 0;
                for (let i = 0; i < data.length; i += 4) if (data[i] === r && data[i + 1] === g && data[i + 2] === b) count += 1;
                return count > 500;
            }), `bars in ${panel}, ${colorScheme}`);
        }
    }
}, at));

test("page after page, and all of it as CSV", () => withPage(async (page) => {
    const mark = `many-${Math.random()}`;
    sql(`WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1050)
        INSERT INTO ApplicationLogs (Timestamp, LogLevel, Logger, Message) SELECT ${quoted(ago(0))}, 'ERROR', 'tests', '${mark} ' || i FROM n`);
    await show(page, {});
    const shown = async () => (await rows(page, "errors")).map((row) => row.Message);
    const expected = (count) => Array.from({length: count}, (_, i) => `${mark} ${1050 - i}`);
    assert.deepEqual(await shown(), expected(20));
    const more = page.locator("#errors").getByRole("button", {name: "More rows"});
    await more.click();
    await page.locator("#errors tbody tr").nth(39).waitFor();
    assert.deepEqual(await shown(), expected(40));
    await more.click();
    await page.locator("#errors tbody tr").nth(59).waitFor();
    assert.deepEqual(await shown(), expected(60));
    const {name, text} = await saved(page, () => page.locator("#errors").getByRole("button", {name: "CSV"}).click());
    assert.equal(name, "errors.csv");
    const lines = text.trimEnd().split("\r\n");
    assert.match(lines[0], /^\ufeffLogID,Timestamp,LogLevel,/);
    assert.equal(lines.filter((line) => line.includes("LogID,")).length, 1);
    assert.deepEqual(lines.filter((line) => line.includes(mark)).map((line) => line.split(",")[4]), expected(1050));
    sql(`DELETE FROM ApplicationLogs WHERE Message LIKE '${mark}%'`);
    const {company} = newCompany();
    use(company, Array.from({length: 25}, (_, i) => ({user: `user-${i}`, tokens: 100 - i})));
    await show(page, {company});
    await page.locator("#by").selectOption("user");
    await page.locator("#share tbody tr").nth(19).waitFor();
    await page.locator("#share").getByRole("button", {name: "More rows"}).click();
    await page.locator("#share tbody tr").nth(24).waitFor();
    assert.deepEqual((await rows(page, "share")).map((row) => row.User), Array.from({length: 25}, (_, i) => `user-${i}`));
    assert.equal(await page.locator("#share").getByRole("button", {name: "More rows"}).isVisible(), false); // the last page
    assert.equal(await page.evaluate(() => document.activeElement.getAttribute("aria-label")), "Who used it");
    await show(page, {company: "nobody"});
    assert.equal(await page.locator("#errors").getByText("Nothing.").isVisible(), true);
}, at));

describe("who may not is told so", () => {
    const problem = (page) => page.locator("#problem").innerText();

    test("no key, a wrong one, a client's", () => withPage(async (page) => {
        await page.getByRole("button", {name: "Show"}).click();
        assert.equal(await page.locator("#key-error").innerText(), "The administrator’s key is missing.");
        assert.equal(await page.evaluate(() => document.activeElement.id), "key");
        await ask(page, {as: `extract_${"A".repeat(43)}`});
        await page.locator("#problem").waitFor();
        assert.match(await problem(page), /^A valid client key is required\.\n+Request [0-9a-f-]{36}$/);
        assert.equal(await page.evaluate(() => document.activeElement.id), "problem");
        const {company} = newCompany();
        await ask(page, {as: ctl("open", ["client-key", "add", "--company", company]).trim().split(/\s+/).at(-1)});
        await page.locator("#problem").getByText("This needs an administrator's client key (extractctl client-key add --admin).").waitFor();
        await show(page, {});
        assert.equal(await page.locator("#problem").isVisible(), false);
    }, at));

    test("from elsewhere", () => withPage(async (page) => {
        await page.setExtraHTTPHeaders({"X-Forwarded-For": "203.0.113.9"}); // passed on by a proxy
        await ask(page);
        await page.locator("#problem").waitFor();
        assert.match(await problem(page), /^There is nothing at this path\.\n+The web server lets administrators in from certain machines only/);
        assert.equal(await page.locator("#panels").isVisible(), false);
    }, at));

    test("nobody answers", () => withPage(async (page) => {
        await ask(page);
        await page.locator("#problem").waitFor();
        assert.match(await problem(page), /^The service is overloaded or not running\./);
    }, {...at, stack: "dead"}));
});

test("the key is kept only where that is ticked", () => withPage(async (page) => {
    const kept = () => page.evaluate(() => Object.fromEntries(Object.entries(localStorage)));
    await show(page, {});
    assert.deepEqual(await kept(), {});
    await page.getByLabel("Remember the key on this device").check();
    assert.deepEqual(await kept(), {"extract-fcgi.admin-key": key});
    await page.reload();
    await page.locator("#status").getByText(/^As of /).waitFor(); // it asks by itself
    await page.getByRole("button", {name: "Forget the key"}).click();
    assert.deepEqual(await kept(), {});
    await page.reload();
    await page.locator("html[data-ready]").waitFor();
    assert.equal(await page.locator("#key").inputValue(), "");
}, at));

for (const look of LOOKS) {
    test(`accessible and in its place: ${look.name}`, () => withPage(async (page) => {
        const looksRight = async (name) => {
            await picture(page, `dashboard-${name}-${look.name}`);
            await isAccessible(page);
            await fits(page);
        };
        await looksRight("empty");
        const {company, key: apiKey} = newCompany("open", "--limit", "400000", "--threshold", "0.001", "--company-name", "Example & Sons Ltd");
        await extract(page, company);
        await emulator.always(apiKey, {status: 503});
        await extract(page, company, {user: "Chloë"});
        use(company, Array.from({length: 28}, (_, days) => ({days, tokens: 20_000 + Math.round(15_000 * Math.sin(days)), user: ["Anna", "Bert", "Chloë"][days % 3],
            branch: ["Lyon", "Nantes", "A branch with quite a long name"][days % 3]})));
        sql(`INSERT INTO ApplicationLogs (Timestamp, LogLevel, Logger, Message, Exception, RequestID, Host)
            VALUES (${quoted(ago(0))}, 'CRITICAL', 'tests', 'three companies'' tokens at fault within a minute', 'HTTP 400: API key not valid', NULL, 'host-1')`);
        await show(page, {period: "30d"});
        await show(page, {company});
        await page.locator("#by").selectOption("user");
        await page.locator("#share th").getByText("User", {exact: true}).waitFor();
        await page.locator("#share canvas").waitFor();
        await looksRight("full");
        await page.locator("#time summary").click();
        await looksRight("open");
        await ask(page, {as: "wrong"});
        await page.locator("#problem").waitFor();
        await looksRight("refused");
    }, {...at, look, isMobile: look.viewport.width < 500}));
}
