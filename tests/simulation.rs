//! The mesh in simulated time: real protocols and real inventories, a modelled network. Every run prints its seed;
//! `LIGHTERMAN_SIM_SEED` repeats it, `LIGHTERMAN_SIM_NODES` sets the size of the large one.
//!
//! Small clusters run always. The large one, which the figures are of, runs in release builds alone.

mod simulation {
    mod agenda;
    mod calibration;
    mod content;
    mod fuzz;
    mod large;
    mod liars;
    mod liveness;
    mod mesh;
    mod partition;
    mod releases;
    mod size;
    mod starting;
    mod swarm;
}
