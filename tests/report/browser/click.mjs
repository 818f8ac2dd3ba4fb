// Open a page, click through it, and print as JSON what a reader sees: node click.mjs page.html [folder for pictures]
import chromium from "@sparticuz/chromium";
import puppeteer from "puppeteer-core";

const [, , file, pictures] = process.argv;
const browser = await puppeteer.launch({
  args: chromium.args,
  executablePath: await chromium.executablePath(),
  headless: "shell",
});
const seen = { problems: [], views: [] };
for (const [width, scheme] of [[1280, "light"], [1280, "dark"], [420, "light"], [420, "dark"]]) {
  const page = await browser.newPage();
  page.on("console", (message) => seen.problems.push(`console: ${message.text()}`));
  page.on("pageerror", (error) => seen.problems.push(`error: ${error.message}`));
  page.on("requestfailed", (request) => seen.problems.push(`failed: ${request.url()}`));
  page.on("request", (request) => {
    if (!request.url().startsWith("file:") && !request.url().startsWith("data:"))
      seen.problems.push(`asked for: ${request.url()}`);
  });
  await page.setViewport({ width, height: 1000 });
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
  await page.goto(`file://${file}`);
  const view = { width, scheme, title: await page.title(), groups: [], rows: [] };
  const count = await page.$$eval("g.group", (lines) => lines.length);
  for (let k = 0; k < count; k += 1) {
    await page.$$eval("g.group", (lines, at) => lines[at].dispatchEvent(new MouseEvent("click", { bubbles: true })), k);
    view.groups.push(await page.$eval("#panel", (panel) => panel.innerText));
  }
  for (const row of await page.$$("tr[data-row] button")) {
    await row.evaluate((button) => button.scrollIntoView({ block: "center" }));
    await row.click();
    view.rows.push(await page.$eval("#panel", (panel) => panel.innerText));
  }
  view.chosen = await page.$$eval("tr.on", (rows) => rows.length);
  view.overflow = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
  view.background = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  if (pictures) await page.screenshot({ path: `${pictures}/${width}-${scheme}.png` });
  seen.views.push(view);
  await page.close();
}
await browser.close();
console.log(JSON.stringify(seen));
