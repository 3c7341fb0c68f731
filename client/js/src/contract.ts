/** The messages and the service of the contract, for whoever needs more than the client shows. */

export * from "./gen/pretrade/decision/v1/decision_pb.js";
