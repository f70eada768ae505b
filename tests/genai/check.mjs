// Google's own client library (@google/genai) against the emulator: what it sends is accepted, what the emulator
// answers is understood. Where this passes, a client that the emulator accepts speaks Google's language.
//
//     python3 tests/emulator/gemini_emulator.py --listen 127.0.0.1:19090 &
//     cd tests/genai && npm ci && EMULATOR_URL=http://127.0.0.1:19090 node check.mjs
//
// Runs on Node 18 and later. Last line: "N passed, N failed"; exit code 1 where any failed.

import assert from "node:assert/strict";
import { ApiError, GoogleGenAI } from "@google/genai";

const url = (process.env.EMULATOR_URL ?? "http://127.0.0.1:19090").replace(/\/+$/, "");
const model = "gemini-3.5-flash";
const ai = new GoogleGenAI({ apiKey: "genai-key", vertexai: false, httpOptions: { baseUrl: url } });

const pdf = Buffer.from("%PDF-1.4\n1 0 obj<</Type /Page>>endobj\n%%EOF\n").toString("base64");
const contents = [
  { role: "user", parts: [{ inlineData: { mimeType: "application/pdf", data: pdf } }, { text: "Read this invoice." }] },
];
const nullable = { type: ["string", "null"] };
const schema = {
  type: "object",
  properties: { invoice_number: nullable, totals: { type: "object", properties: { total: nullable } } },
  required: ["invoice_number", "totals"],
};
const config = { responseMimeType: "application/json", responseJsonSchema: schema };

async function control(path, body) {
  const options = body === undefined ? {} : { method: "POST", body: JSON.stringify(body) };
  const answer = await fetch(`${url}/__emulator/${path}`, options);
  assert.equal(answer.status, 200, await answer.clone().text());
  return answer.json();
}

async function refused(scenario) {
  await control("script", { key: "genai-key", scenario, repeat: true });
  try {
    await ai.models.generateContent({ model, contents, config });
  } catch (error) {
    assert(error instanceof ApiError, `not an ApiError: ${error}`);
    return { status: error.status, error: JSON.parse(error.message).error };
  }
  return assert.fail("was not refused");
}

const kind = (error, name) => error.details.find((detail) => detail["@type"].endsWith(name));

const checks = {
  "an invoice from a PDF, by responseJsonSchema": async () => {
    const answer = await ai.models.generateContent({
      model, contents, config: { ...config, systemInstruction: "Be exact.", maxOutputTokens: 8192 },
    });
    const invoice = JSON.parse(answer.text);
    assert.match(invoice.invoice_number, /^INV-[0-9A-F]{8}$/);
    assert.equal(invoice.totals.total, "1249.50");
    assert.equal(answer.candidates[0].finishReason, "STOP");
    assert.equal(answer.modelVersion, model);
    const usage = answer.usageMetadata;
    assert.equal(usage.totalTokenCount,
      usage.promptTokenCount + usage.candidatesTokenCount + usage.thoughtsTokenCount);
    assert.deepEqual(usage.promptTokensDetails.map((detail) => detail.modality), ["TEXT", "DOCUMENT"]);
    const [call] = await control("log");
    assert.equal(call.key, "genai-key");
    assert.equal(call.prompt, "Be exact.\nRead this invoice.");
    assert.deepEqual(call.generationConfig.responseJsonSchema, schema);
  },
  "the older responseSchema": async () => {
    const older = { type: "OBJECT", properties: { invoice_number: { type: "STRING", nullable: true } } };
    const answer = await ai.models.generateContent({
      model, contents, config: { responseMimeType: "application/json", responseSchema: older },
    });
    assert.equal(JSON.parse(answer.text).currency, "EUR");
    assert.equal((await control("log"))[0].has_schema, true);
  },
  "thoughts are not part of the text": async () => {
    const parts = [{ text: "Let me see.", thought: true }, { text: "{}" }];
    await control("script", { key: "genai-key", steps: [{ parts }] });
    assert.equal((await ai.models.generateContent({ model, contents, config })).text, "{}");
  },
  "a blocked prompt": async () => {
    await control("script", { key: "genai-key", scenario: "blocked" });
    const answer = await ai.models.generateContent({ model, contents, config });
    assert.equal(answer.promptFeedback.blockReason, "PROHIBITED_CONTENT");
    assert.equal(answer.candidates, undefined);
  },
  "429 with a retry hint": async () => {
    const { status, error } = await refused("rate_limited");
    assert.equal(status, 429);
    assert.equal(error.status, "RESOURCE_EXHAUSTED");
    assert.equal(kind(error, "RetryInfo").retryDelay, "1.837906927s");
  },
  "400 for an invalid key": async () => {
    const { status, error } = await refused("invalid_key");
    assert.equal(status, 400);
    assert.equal(kind(error, "ErrorInfo").reason, "API_KEY_INVALID");
  },
  "503 when overloaded": async () => {
    const { status, error } = await refused("overloaded");
    assert.equal(status, 503);
    assert.equal(error.status, "UNAVAILABLE");
  },
  "the models": async () => {
    const names = [];
    for await (const each of await ai.models.list()) names.push(each.name);
    assert(names.includes(`models/${model}`));
    assert.equal((await ai.models.get({ model })).name, `models/${model}`);
  },
};

let passed = 0;
let failed = 0;
for (const [name, check] of Object.entries(checks)) {
  try {
    await control("reset", {});
    await check();
    passed += 1;
    console.log(`ok      ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED  ${name}: ${error.stack}`);
  }
}
await control("reset", {}).catch(() => {});
console.log(`${passed} passed, ${failed} failed`);
process.exitCode = failed ? 1 : 0;
