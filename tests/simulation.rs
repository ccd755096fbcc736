//! The mesh in simulated time: real protocols and real inventories on a modelled network. Every run
//! prints its seed. `LIGHTERMAN_SIM_SEED` repeats a run, `LIGHTERMAN_SIM_NODES` sets the size of
//! the large cluster.
//!
//! Small clusters run in every build. The large cluster, whose figures are published, runs only in
//! release builds.

mod simulation {
    mod calibration;
    mod content;
    mod event_queue;
    mod fuzz;
    mod joining;
    mod large;
    mod liveness;
    mod lying_members;
    mod mesh;
    mod partition;
    mod releases;
    mod setup;
    mod swarm;
}
