// A program that logs each line of its standard input: node writer.cjs HOW LOG MODULES
const { createRequire } = require("module");
const path = require("path");
const readline = require("readline");

const [how, log, modules] = process.argv.slice(2);
const load = createRequire(path.join(modules, "none.js"));
const folder = path.dirname(log), base = path.basename(log), stem = base.replace(/\.log$/, "");
const MOST = 24000, KEPT = 30;

function byWinston(transport) {
  const winston = load("winston");
  const logger = winston.createLogger({
    format: winston.format.printf(info => info.message),
    transports: [transport(winston)],
  });
  return [line => logger.info(line), () => logger.end()];
}

function byStream(options, name = base) {
  const stream = load("rotating-file-stream").createStream(name, { path: folder, size: "24K", maxFiles: KEPT, ...options });
  return [line => stream.write(line + "\n"), () => stream.end()];
}

function byLog4js(appender) {
  const log4js = load("log4js");
  const layout = { type: "pattern", pattern: "%m" };
  log4js.configure({
    appenders: { file: { filename: log, layout, ...appender } },
    categories: { default: { appenders: ["file"], level: "info" } },
  });
  const logger = log4js.getLogger();
  return [line => logger.info(line), () => log4js.shutdown(() => {})];
}

async function byPinoRoll() {
  const roll = load("pino-roll");
  const build = roll.default || roll;
  const stream = await build({ file: path.join(folder, stem), size: "24k", extension: ".log", symlink: true });
  return [line => stream.write(line + "\n"), () => stream.end()];
}

function byDaily() {
  const Daily = load("winston-daily-rotate-file");
  return byWinston(() => new Daily({
    filename: path.join(folder, stem + "-%DATE%.log"), datePattern: "YYYY-MM-DD", maxSize: MOST, maxFiles: KEPT,
    createSymlink: true, symlinkName: base,
  }));
}

const ways = {
  "winston": () => byWinston(it => new it.transports.File({ filename: log, maxsize: MOST, maxFiles: KEPT, tailable: true })),
  "winston-daily": byDaily,
  "pino-roll": byPinoRoll,
  "stream-classical": () => byStream({ rotate: KEPT }),
  "stream-classical-gz": () => byStream({ rotate: KEPT, compress: "gzip" }),
  "stream": () => byStream({}),
  "log4js": () => byLog4js({ type: "file", maxLogSize: MOST, backups: KEPT }),
  "log4js-date": () => byLog4js({ type: "dateFile", pattern: "yyyy-MM-dd-hh-mm-ss", numBackups: KEPT }),
};

(async () => {
  const [write, end] = await ways[how]();
  const input = readline.createInterface({ input: process.stdin });
  input.on("line", write);
  input.on("close", end);
})();
