// What the tests in a browser share: Chromium, the stacks that pytest has started, the Gemini emulator, and a page
// that fails its test for whatever it has to complain about.

import assert from "node:assert/strict";
import {execFileSync} from "node:child_process";
import {randomBytes} from "node:crypto";
import fs from "node:fs";
import path from "node:path";
import {createRequire} from "node:module";
import {chromium} from "playwright-core";

const {STACKS, EMULATOR_URL, BUILD, SAMPLES, DOWNLOADS, SCREENSHOTS} = process.env;
const axe = fs.readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const PATIENCE = 60_000; // an upper bound for what must happen, never a delay

export const stacks = JSON.parse(fs.readFileSync(STACKS, "utf8"));
export const sample = (name) => path.join(SAMPLES, name);
export const scratch = (name) => path.join(DOWNLOADS, name);

// ---- the emulator, and what extractctl does ----

async function control(what, body) {
    const answer = await fetch(`${EMULATOR_URL}/__emulator/${what}`, body === undefined ? {} : {method: "POST", body: JSON.stringify(body)});
    assert.equal(answer.status, 200, await answer.clone().text());
    return answer.json();
}

export const emulator = {
    reset: () => control("reset", {}),
    script: (key, ...steps) => control("script", {key, steps}),
    always: (key, ...steps) => control("script", {key, steps, repeat: true}),
    scenario: (key, scenario) => control("script", {key, scenario, repeat: true}),
    log: () => control("log"),
    release: (count = null) => control("release", {count}),
    wait: (counts) => control(`wait?${new URLSearchParams({...counts, timeout: PATIENCE / 1000})}`),
};

export function ctl(stack, args, input = "") {
    const env = {...process.env, ...stacks[stack].env};
    return execFileSync(path.join(BUILD, "extractctl"), args, {env, input, encoding: "utf8"});
}

/** A company of the test's own with a token; {company, key, token}. */
export function newCompany(stack = "open", ...args) {
    const id = randomBytes(6).toString("hex");
    const [company, key] = [`C-${id}`, `key-${id}-${randomBytes(8).toString("hex")}`];
    const token = ctl(stack, ["token", "add", "--company", company, ...args], `${key}\n`).trim();
    return {company, key, token};
}

/** Asks until the answer is true. */
export async function eventually(probe, what) {
    for (const end = Date.now() + PATIENCE; ;) {
        const answer = await probe();
        if (answer) return answer;
        assert(Date.now() < end, `never came true: ${what ?? probe}`);
        await new Promise((resolve) => { setTimeout(resolve, 20); });
    }
}

/** The file that an action gives to the user's downloads. */
export async function saved(page, action) {
    const [download] = await Promise.all([page.waitForEvent("download"), action()]);
    const where = scratch(`download-${Math.random()}`);
    await download.saveAs(where);
    return {name: download.suggestedFilename(), text: fs.readFileSync(where, "utf8")};
}

// ---- the browser ----

let browser;

export async function openBrowser() {
    browser = await chromium.launch({
        executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
        args: process.getuid() === 0 ? ["--no-sandbox"] : [],
    });
}

export const closeBrowser = () => browser.close();

export const LOOKS = [
    {name: "wide-light", viewport: {width: 1280, height: 900}, colorScheme: "light"},
    {name: "wide-dark", viewport: {width: 1280, height: 900}, colorScheme: "dark"},
    {name: "narrow-light", viewport: {width: 390, height: 844}, colorScheme: "light"},
    {name: "narrow-dark", viewport: {width: 390, height: 844}, colorScheme: "dark"},
];

/**
 * The page of a stack, seen by test(page), then closed. Whatever the browser complains of fails the test: a policy that
 * was violated, a script's error, a message on the console (but that /extract or /admin/… answered an error: the page is to say so).
 */
export async function withPage(test, {stack = "open", path: where = "/", look = LOOKS[0], isMobile} = {}) {
    const context = await browser.newContext({
        ignoreHTTPSErrors: true, acceptDownloads: true, viewport: look.viewport, colorScheme: look.colorScheme,
        reducedMotion: "reduce", isMobile, hasTouch: isMobile, permissions: ["clipboard-read", "clipboard-write"],
    });
    context.setDefaultTimeout(PATIENCE);
    const complaints = [];
    await context.addInitScript(() => {
        addEventListener("securitypolicyviolation", (event) =>
            console.error(`policy violated: ${event.violatedDirective} by ${event.blockedURI} ${event.sourceFile}:${event.lineNumber}`));
    });
    const watch = (page) => {
        page.on("pageerror", (error) => complaints.push(`${error.stack}`));
        page.on("console", (message) => {
            const isAnswer = message.text().startsWith("Failed to load resource") && /\/(extract|admin\/.*)$/.test(message.location().url);
            if (!isAnswer && ["error", "warning"].includes(message.type())) complaints.push(message.text());
        });
    };
    context.on("page", watch);
    try {
        const page = await context.newPage();
        await page.goto(stacks[stack].url + where);
        await page.locator("html[data-ready]").waitFor();
        await test(page, context);
        assert.deepEqual(complaints, []);
    } finally {
        await context.close();
    }
}

/** No violation of what axe knows: WCAG 2.2 A and AA, and good practice. */
export async function isAccessible(page) {
    await page.evaluate(axe);
    const violations = await page.evaluate(async () => {
        const found = await globalThis.axe.run(document, {iframes: false, runOnly: {type: "tag", values: [
            "wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}});
        return found.violations.map(({id, help, nodes}) => `${id}: ${help}: ${nodes.map(({html, failureSummary}) =>
            `${html} ${failureSummary}`).join("; ")}`);
    });
    assert.deepEqual(violations, []);
}

/** Nothing sticks out to the right. */
export async function fits(page) {
    const [inner, outer] = await page.evaluate(() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]);
    assert(inner <= outer, `${inner} px are wider than the window's ${outer}`);
}

export async function picture(page, name) {
    if (SCREENSHOTS) await page.screenshot({path: path.join(SCREENSHOTS, `${name}.png`), fullPage: true});
}
