//! Agents as they are installed, one process each: on links of their own, with containerds that the caller starts, admitted by tokens of
//! one real API server, and with the addresses of the first ones. For tests and benchmarks, which both include this folder; what only one
//! of them needs is there.

pub(crate) mod agent;
pub(crate) mod apiserver;
pub(crate) mod network;
pub(crate) mod rbac;
