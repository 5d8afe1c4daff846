// Loaded by every Node process of a client: whatever leaves this machine is noted and refused.
"use strict";

const dns = require("node:dns");
const fs = require("node:fs");
const net = require("node:net");
const os = require("node:os");

function isHere(host) {
  return (
    !host || host === "localhost" || host === os.hostname() || host === "::1" || host.startsWith("127.")
  );
}

function refused(what) {
  fs.appendFileSync(process.env.STEERING_CLIENT_CALLS, `${what}\n`);
  return new Error(`a client may not leave this machine: ${what}`);
}

const connect = net.Socket.prototype.connect;
net.Socket.prototype.connect = function (...args) {
  // Normalised arguments come as one array.
  const first = Array.isArray(args[0]) ? args[0][0] : args[0];
  const host = typeof first === "object" ? first.host : args[1];
  if (!(first && first.path) && !isHere(host)) {
    process.nextTick(() => this.destroy(refused(`connect ${host}`)));
    return this;
  }
  return connect.apply(this, args);
};

const lookup = dns.lookup;
dns.lookup = function (host, ...rest) {
  if (!isHere(host) && !net.isIP(host)) {
    process.nextTick(rest.at(-1), refused(`look up ${host}`));
    return;
  }
  return lookup.call(this, host, ...rest);
};
