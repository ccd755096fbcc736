//! The mesh in simulated time: real protocols and real inventories, a modelled network. Every run prints its seed;
//! `LIGHTERMAN_SIM_SEED` repeats it, `LIGHTERMAN_SIM_NODES` sets the size of the large one.
//!
//! Small clusters run always. The large one, which the figures are of, runs in release builds alone.

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
