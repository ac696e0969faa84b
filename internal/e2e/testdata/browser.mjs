// Headless Chromium: browser.mjs '{"dashboard","web","session","chat","answer","user","password","shots"}'
// prints one JSON object about the dashboard, an EventSource and OpenCode's web UI.
import { chromium } from "playwright-core";
import { join } from "node:path";

const o = JSON.parse(process.argv[2]);
const out = { steps: [], console: [] };
const browser = await chromium.launch({
  executablePath: o.chromium,
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"],
});
let page;
try {
  const context = await browser.newContext({
    viewport: { width: 1280, height: 800 },
    ...(o.user ? { httpCredentials: { username: o.user, password: o.password } } : {}),
  });
  context.setDefaultTimeout(45_000);
  page = await context.newPage();
  page.on("console", (m) => m.type() === "error" && out.console.push(m.text()));
  page.on("pageerror", (e) => out.console.push("uncaught: " + e.message));

  await page.goto(o.dashboard);
  const row = page.getByText(o.session, { exact: true }).first();
  await row.waitFor();
  await page.getByText(/running/i).first().waitFor();
  await page.screenshot({ path: join(o.shots, "dashboard.png") });
  out.steps.push("dashboard lists the session");

  out.events = await page.evaluate(async ({ session, chat }) => {
    const source = new EventSource(`/v1/sessions/${session}/events`);
    const got = [];
    await new Promise((resolve, reject) => {
      setTimeout(() => reject(new Error("no idle event within 30 s; got " + got.map((e) => e.type))), 30_000);
      source.onerror = () => source.readyState === EventSource.CLOSED && reject(new Error("the EventSource was refused"));
      for (const type of ["lifecycle", "opencode", "gap", "end"])
        source.addEventListener(type, (e) => {
          const type = e.type === "opencode" ? JSON.parse(e.data).payload.type : e.type;
          got.push({ type, id: e.lastEventId });
          if (type === "session.idle") resolve();
        });
      source.onopen = () =>
        fetch(`/v1/sessions/${session}/proxy/session/${chat}/prompt_async`, {
          method: "POST",
          headers: { "content-type": "application/json" },
          body: JSON.stringify({ parts: [{ type: "text", text: "hello from the browser" }] }),
        }).then((r) => r.status === 204 || reject(new Error("prompt: " + r.status)));
    });
    source.close();
    return got;
  }, o);
  out.steps.push("EventSource");

  await page.goto(o.web);
  await page.getByText(o.answer).first().waitFor();
  await page.getByText("You said: hello from the browser").first().waitFor();
  await page.screenshot({ path: join(o.shots, "web.png") });
  out.title = await page.title();
  out.steps.push("web UI shows the chat");

  // Typed as a person does it; the answer comes by the UI's own event stream.
  const input = page.locator('[contenteditable="true"], textarea').last();
  await input.click();
  await page.keyboard.type("typed in the web UI");
  await page.keyboard.press("Enter");
  await page.getByText("You said: typed in the web UI").first().waitFor();
  await page.screenshot({ path: join(o.shots, "typed.png") });
  out.steps.push("web UI prompts");
} catch (e) {
  out.error = String(e.stack ?? e);
  await page?.screenshot({ path: join(o.shots, "failed.png") }).catch(() => {});
  out.text = await page?.evaluate(() => document.body.innerText).catch(() => "");
} finally {
  await browser.close();
}
console.log(JSON.stringify(out));
