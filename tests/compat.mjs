// node compat.mjs PAGE MODULES: what the page uses that one of the old browsers below lacks; exit 1 if there is any.
// MODULES is a folder in which acorn, acorn-walk, postcss and @mdn/browser-compat-data are installed. It cannot see
// everything: not the options of a call (scrollTo's "smooth"), nor which of several interfaces a member belongs to (it
// speaks up where all of them are too new).
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { resolve } from "node:path";

const [page, modules] = process.argv.slice(2);
const load = createRequire(resolve(modules, "x"));
const [acorn, walk, postcss] = ["acorn", "acorn-walk", "postcss"].map(load);
const data = load("@mdn/browser-compat-data");

const OLDEST = { chrome: "88", edge: "88", firefox: "85", safari: "14", opera: "74" };
const YEAR = 2021; // the newest edition of ECMAScript whose syntax all of them read
const HARMLESS = {
  "css outline": "partial in Safari: it does not follow rounded corners",
  "css overscroll-behavior": "ignored by Safari 14: the page behind bounces",
  "css :-webkit-search-cancel-button": "the others show no cross in the field, or one more",
  "css :-webkit-scrollbar": "without it a scroll bar lies under the rail",
  "css @media forced-colors": "ignored where there are no forced colours",
  "css color-scheme": "ignored by Firefox 85: scroll bars stay light",
};

const isOld = (version, browser) => typeof version === "string" && version !== "preview" &&
  version.replace("≤", "").localeCompare(OLDEST[browser], "en", { numeric: true }) <= 0;
const has = (browser, { support }) => [support[browser]].flat().some(s =>
  s && !s.flags && !s.prefix && !s.alternative_name && !s.partial_implementation &&
  isOld(s.version_added, browser) && !isOld(s.version_removed, browser));
const lacking = entry => entry?.__compat ? Object.keys(OLDEST).filter(browser => !has(browser, entry.__compat)) : [];

const html = readFileSync(page, "utf8");
const found = new Set();
const check = (entry, where, what) => {
  const missing = lacking(entry).map(browser => `${browser} ${OLDEST[browser]}`);
  if (missing.length && !(what in HARMLESS)) found.add(`line ${where}: ${what}: not in ${missing.join(", ")}`);
};
const own = (object, name) => object && Object.hasOwn(object, name) ? object[name] : undefined;
const lineAt = offset => html.slice(0, offset).split("\n").length;
function* inside(tag) {
  for (const match of html.matchAll(new RegExp(`<${tag}\\b[^>]*>([\\s\\S]*?)</${tag}>`, "g"))) {
    yield [match[1], lineAt(match.index + match[0].indexOf(">")) - 1];
  }
}

// -- script ---------------------------------------------------------------------------------------

const builtins = data.javascript.builtins, api = data.api;
const globalNamed = name =>
  own(builtins, name) || own(api, name) || own(api.Window, name) || own(api, name + "_static");
const members = {}; // name -> what every interface says of its member of that name
for (const root of [api, builtins]) {
  for (const type of Object.values(root)) {
    for (const [name, entry] of Object.entries(type)) {
      if (entry.__compat) (members["." + name.replace(/_static$/, "")] ||= []).push(entry);
    }
  }
}
const checkMember = (name, where, what) => {
  const candidates = members["." + name] || [];
  if (candidates.length && candidates.every(entry => lacking(entry).length)) check(candidates[0], where, what);
};
const checkPattern = (pattern, flags, where) => {
  const expressions = data.javascript.regular_expressions;
  if (/\(\?<[=!]/.test(pattern)) check(expressions.lookbehind_assertion, where, "look-behind");
  if (flags.includes("d")) check(builtins.RegExp.hasIndices, where, "regular expression flag d");
  if (flags.includes("v")) check(builtins.RegExp.unicodeSets, where, "regular expression flag v");
};

for (const [script, before] of inside("script")) {
  const parse = ecmaVersion => acorn.parse(script, { ecmaVersion, locations: true });
  try {
    parse(YEAR);
  } catch (error) {
    found.add(`line ${before + error.loc.line}: syntax newer than ES${YEAR}: ${error.message}`);
  }
  const tree = parse("latest"), line = node => before + node.loc.start.line;
  const declared = new Set(), keys = new Set(), called = new Set(); // a key of its own may be read, but not called
  walk.simple(tree, {
    VariablePattern: node => declared.add(node.name),
    Property: node => keys.add(node.key.name),
    CallExpression: node => called.add(node.callee),
  });
  walk.simple(tree, {
    Identifier(node) {
      if (!declared.has(node.name)) check(globalNamed(node.name), line(node), node.name);
    },
    MemberExpression(node) {
      if (node.computed) return;
      const { object, property: { name } } = node, type = object.type === "Identifier" && globalNamed(object.name);
      const exact = type && (own(type, name + "_static") || own(type, name));
      if (exact) check(exact, line(node), `${object.name}.${name}`);
      else if (called.has(node) || !keys.has(name)) checkMember(name, line(node), `.${name}`);
    },
    CallExpression({ callee, arguments: [first] }) {
      if (callee.property?.name !== "addEventListener" || !first.value) return;
      checkMember(`${first.value}_event`, line(first), `event ${first.value}`);
    },
    NewExpression({ callee, arguments: [first, second] }) {
      if (callee.name === "RegExp") checkPattern(String(first?.value), String(second?.value ?? ""), line(callee));
      else check(own(globalNamed(callee.name), callee.name), line(callee), `new ${callee.name}`);
    },
    Literal(node) {
      if (node.regex) checkPattern(node.regex.pattern, node.regex.flags, line(node));
    },
  });
}

// -- style ----------------------------------------------------------------------------------------

const { properties, selectors, types, "at-rules": atRules } = data.css;
const checkDeclaration = (node, where) => {
  const { prop, value } = node, property = own(properties, prop);
  check(property, where, `css ${prop}`);
  for (const [word, called] of value.matchAll(/[a-z][\w-]*(\()?/gi)) {
    const name = word.replace("(", "");
    check(own(property, name), where, `css ${prop}: ${name}`);
    if (called) check(own(types, name) || own(types.color, name), where, `css ${name}()`);
  }
  const unit = /\d(?:([dsl])v[hwib]|(cq\w+|r?lh|cap|ic))\b/.exec(value);
  const viewport = { d: "dynamic", s: "small", l: "large" }[unit?.[1]];
  if (unit) check(types.length[unit[2] || `viewport_percentage_units_${viewport}`], where, `css unit ${unit[0]}`);
  let flex = false;
  if (/gap$/.test(prop)) node.parent.walkDecls("display", display => { flex ||= display.value.includes("flex"); });
  if (flex) check(property.flex_context, where, `css ${prop} in a flex box`);
};
const checkRule = ({ parent, selector }, where) => {
  if (parent.type === "rule" || selector.includes("&")) check(selectors.nesting, where, "css nesting");
  for (const [, name] of selector.matchAll(/::?([a-z-]+)/g)) check(own(selectors, name), where, `css :${name}`);
};
const checkAtRule = ({ name, params }, where) => {
  check(atRules[name], where, `css @${name}`);
  for (const [, word] of params.matchAll(/\(([a-z-]+)/g)) {
    check(own(atRules[name], word), where, `css @${name} ${word}`);
  }
};
for (const [style, before] of inside("style")) {
  const checks = { decl: checkDeclaration, rule: checkRule, atrule: checkAtRule };
  postcss.parse(style).walk(node => checks[node.type]?.(node, before + node.source.start.line));
}

// -- markup ---------------------------------------------------------------------------------------

const markup = html.replace(/<!--[\s\S]*?-->|<(script|style)\b[\s\S]*?<\/\1>/g, text => text.replace(/[^\n]/g, " "));
for (const { 1: tag, 2: attributes, index } of markup.matchAll(/<([a-z][\w-]*)((?:"[^"]*"|[^"<>])*)>/g)) {
  const element = own(data.html.elements, tag);
  check(element, lineAt(index), `<${tag}>`);
  for (const [, name] of attributes.replace(/"[^"]*"/g, "").matchAll(/\s([a-z-]+)/g)) {
    check(own(element, name) || own(data.html.global_attributes, name), lineAt(index), `<${tag} ${name}>`);
  }
}

for (const line of found) console.log(line);
process.exit(found.size ? 1 : 0);
