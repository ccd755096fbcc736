//! Agents as users install them, one process each, on links of their own. The caller starts the
//! containerds, tokens of one real API server admit the agents, and every agent joins the addresses
//! of the first agents. Tests and benchmarks both include this folder, so the folder has only code
//! that both use.

pub(crate) mod agent;
pub(crate) mod apiserver;
pub(crate) mod network;
pub(crate) mod rbac;
