//! Handlers of the simulation's events.

use std::rc::Rc;
use std::time::Duration;

use lighterman::decide::claim::LeaseStep;
use lighterman::decide::piece_picker::{FollowChange, PieceRequestId, RequestEnd};
use lighterman::model::{PieceMapUpdate, PieceRequest};
use rand::Rng;

use super::network::{SentChunk, StreamId};
use super::node::{NodeBehavior, SwarmNode};
use super::simulation::{Event, SwarmSimulation};

/// Batching interval of piece announcements to followers, in microseconds.
const ANNOUNCE_INTERVAL: u64 = 50_000;
/// Interval between chunks of a dripping node, in microseconds.
const DRIP: u64 = 1_000_000;

impl SwarmSimulation {
    pub(super) fn handle_event(&mut self, event: Event) {
        match event {
            Event::Gossip { node, round } => self.run_gossip_round(node, round),
            Event::Wake { node } => {
                if self.nodes[node].wake_at <= self.now {
                    self.nodes[node].wake_at = u64::MAX;
                    self.drive(node);
                }
            }
            Event::Request { from, to, request, piece_request } => {
                self.handle_request(from, to, request, piece_request)
            }
            Event::Ended { to, request, end } => {
                if self.nodes[to].in_flight.remove(&request).is_some() {
                    let now = self.instant();
                    self.nodes[to].picker.end_request(request, end, now);
                    self.drive(to);
                }
            }
            Event::Cancelled { from, at, request } => self.handle_cancel(from, at, request),
            Event::Follow { from, to, begins } => self.handle_follow(from, to, begins),
            Event::PieceMapUpdate { from, to, update } => {
                if self.nodes[to].done_at.is_none() && self.nodes[to].is_alive {
                    let (peer, digest, now) = (self.nodes[from].peer, self.digest, self.instant());
                    self.nodes[to].picker.record_piece_map(peer, digest, &update, now);
                    self.drive(to);
                }
            }
            Event::PeerDead { from, to } => self.handle_dead_peer(from, to),
            Event::Flush { node } => self.announce_pieces(node),
            Event::LinkFree { node } => {
                self.network.sent(node);
                self.send_chunk(node);
            }
            Event::Received { stream, from, to, request, piece, bytes } => {
                self.network.received(stream);
                if self.nodes[from].is_alive {
                    self.send_chunk(from);
                }
                self.receive_chunk(from, to, request, piece, bytes);
            }
            Event::Drip { stream } => {
                self.network.queue(stream);
                let node = self.network.stream(stream).from;
                self.send_chunk(node);
            }
            Event::Claim { node, step } => self.handle_claim(node, step),
        }
    }

    /// Executes the pending actions of a node's piece picker.
    pub(super) fn drive(&mut self, node: usize) {
        let this = &self.nodes[node];
        if !this.is_alive || node == 0 || this.behavior == NodeBehavior::Liar {
            return;
        }
        let now = self.instant();
        if this.zone.is_some() && this.done_at.is_none() {
            let this = &mut self.nodes[node];
            let is_leading = this.zone_leader.update_is_leading(now);
            this.picker.set_cross_zone(is_leading);
            self.claim_if_due(node);
        }
        for change in self.nodes[node].picker.take_follow_changes(now) {
            let (FollowChange::Follow { peer, .. } | FollowChange::Unfollow { peer, .. }) = change;
            let (to, begins) = (self.numbers[&peer], matches!(change, FollowChange::Follow { .. }));
            self.after(self.latency(node, to), Event::Follow { from: node, to, begins });
        }
        while let Some(request) = self.nodes[node].picker.next_request(now) {
            let to = self.numbers[&request.request.peer];
            self.nodes[node].in_flight.insert(request.id, (to, 0));
            self.after(
                self.latency(node, to),
                Event::Request { from: node, to, request: request.id, piece_request: request.request },
            );
        }
        for request in self.nodes[node].picker.take_cancellations() {
            if let Some((at, received)) = self.nodes[node].in_flight.remove(&request) {
                self.nodes[node].wasted += received;
                self.after(self.latency(node, at), Event::Cancelled { from: node, at, request });
            }
        }
        let this = &self.nodes[node];
        let wakes = [this.picker.wake_at(), this.zone_leader.wake_at(), this.zone_leader.claim_due()];
        let wakes = wakes.into_iter().take(if this.zone.is_some() { 3 } else { 1 });
        let wake = wakes.flatten().map(|at| self.micros(at)).filter(|at| *at > self.now).min();
        if let Some(wake) = wake.filter(|wake| *wake < this.wake_at && this.done_at.is_none()) {
            self.nodes[node].wake_at = wake;
            self.after(wake - self.now, Event::Wake { node });
        }
    }

    fn handle_request(&mut self, from: usize, to: usize, request: PieceRequestId, piece_request: PieceRequest) {
        if !self.nodes[to].is_alive {
            return;
        }
        let (client, pieces) = (self.nodes[from].peer, self.layout.piece_count());
        let this = &mut self.nodes[to];
        match this.slots.enqueue(client, piece_request.digest, pieces) {
            Ok(ticket) => {
                this.queued_requests.insert(ticket, (from, request, piece_request));
                this.served_requests.insert((from, request), (ticket, None));
                self.serve(to);
            }
            Err(_) => self.after(self.latency(from, to), Event::Ended { to: from, request, end: RequestEnd::Busy }),
        }
    }

    fn serve(&mut self, node: usize) {
        while let Some(ticket) = self.nodes[node].slots.start_next() {
            let Some((client, request, piece_request)) = self.nodes[node].queued_requests.remove(&ticket) else {
                continue;
            };
            let stream = self.network.open(node, client, request, ticket, piece_request.pieces, piece_request.limit);
            self.nodes[node].served_requests.insert((client, request), (ticket, Some(stream)));
            self.begin_piece(node, stream);
        }
        self.send_chunk(node);
    }

    /// Chooses the next piece of a response, or ends the response.
    fn begin_piece(&mut self, node: usize, id: StreamId) {
        let stream = self.network.stream(id);
        let (digest, allowed_pieces, left) = (self.digest, stream.allowed_pieces.clone(), stream.pieces_left);
        let this = &mut self.nodes[node];
        let piece = if left == 0 {
            None
        } else {
            let SwarmNode { sent, pieces, behavior, .. } = this;
            let has = |piece: u32| *behavior == NodeBehavior::Liar || pieces.get(piece as usize);
            sent.choose(digest, &allowed_pieces, 1, has).first().copied()
        };
        let length = piece.map_or(0, |piece| self.layout.piece_length(piece as usize));
        let stream = self.network.stream(id);
        let (to, request, ticket) = (stream.to, stream.request, stream.ticket);
        match piece {
            Some(piece) => {
                stream.allowed_pieces.retain(|one| *one != piece);
                (stream.piece, stream.unsent, stream.pieces_left) = (piece, length, left - 1);
                if self.nodes[node].behavior == NodeBehavior::Drips {
                    self.after(DRIP, Event::Drip { stream: id });
                } else {
                    self.network.queue(id);
                }
            }
            None => {
                self.network.close(id);
                self.nodes[node].served_requests.remove(&(to, request));
                self.nodes[node].slots.remove(ticket);
                // The end arrives after all bytes of the response.
                let later = if left == 0 { 200_000 } else { self.latency(node, to) };
                self.after(later, Event::Ended { to, request, end: RequestEnd::Done });
            }
        }
    }

    fn send_chunk(&mut self, node: usize) {
        if !self.nodes[node].is_alive {
            return;
        }
        let (now, zones) = (self.now, &self.nodes);
        let latency = |one: usize, other: usize| if zones[one].zone == zones[other].zone { 500 } else { 2000 };
        let Some(chunk) = self.network.send(node, now, latency) else { return };
        let SentChunk { stream: id, piece, bytes, sent_at, received_at } = chunk;
        let stream = self.network.stream(id);
        let (to, request, ticket, unsent) = (stream.to, stream.request, stream.ticket, stream.unsent);
        self.nodes[node].slots.record_sent(ticket, bytes);
        self.nodes[node].bytes_sent += bytes;
        if self.nodes[node].zone != self.nodes[to].zone {
            self.cross_zone_bytes += bytes;
        }
        self.after(sent_at - now, Event::LinkFree { node });
        self.after(received_at - now, Event::Received { stream: id, from: node, to, request, piece, bytes });
        if unsent == 0 {
            self.begin_piece(node, id);
            self.serve(node);
        }
    }

    fn receive_chunk(&mut self, from: usize, to: usize, request: PieceRequestId, piece: u32, bytes: u64) {
        let now = self.instant();
        let length = self.layout.piece_length(piece as usize);
        let this = &mut self.nodes[to];
        let Some((_, received)) = this.in_flight.get_mut(&request).filter(|_| this.is_alive) else {
            this.wasted += bytes;
            return;
        };
        if *received == 0 {
            this.picker.begin_piece(request, piece, now);
        }
        *received += bytes;
        this.picker.record_bytes(request, bytes, now);
        if *received < length {
            return;
        }
        *received = 0;
        this.picker.complete_piece(request, piece, now);
        if self.nodes[from].behavior == NodeBehavior::Liar {
            let (liar, digest) = (self.nodes[from].peer, self.digest);
            let this = &mut self.nodes[to];
            this.picker.discard_piece(digest, piece);
            this.picker.exclude_peer(liar, now + Duration::from_secs(600));
        } else {
            let (peer, digest) = (self.nodes[from].peer, self.digest);
            self.nodes[to].picker.record_verified_piece(peer, digest);
            self.complete_piece(from, to, piece);
        }
        self.drive(to);
    }

    fn complete_piece(&mut self, from: usize, to: usize, piece: u32) {
        let (now, half) = (self.instant(), (self.now / 500_000) as usize);
        let is_near = self.nodes[from].zone == self.nodes[to].zone;
        let this = &mut self.nodes[to];
        if is_near {
            this.zone_leader.record_zone_progress(now);
        }
        if this.pieces.get(piece as usize) {
            this.wasted += self.layout.piece_length(piece as usize);
            return;
        }
        this.pieces.set(piece as usize);
        this.missing -= 1;
        this.unannounced.push(piece);
        let (is_first, is_done) = (this.unannounced.len() == 1, this.missing == 0);
        if is_done {
            this.done_at = Some(self.now);
            if this.has_claim {
                let zone = this.zone.clone().expect("a claiming node has a zone");
                self.server.release(&zone);
            }
        }
        if is_first {
            self.after(ANNOUNCE_INTERVAL, Event::Flush { node: to });
        }
        self.useful_bytes.resize(self.useful_bytes.len().max(half + 1), 0);
        self.useful_bytes[half] += self.layout.piece_length(piece as usize);
    }

    fn announce_pieces(&mut self, node: usize) {
        let this = &mut self.nodes[node];
        let pieces = std::mem::take(&mut this.unannounced);
        let update = Rc::new(if this.missing == 0 { PieceMapUpdate::HaveAll } else { PieceMapUpdate::Have(pieces) });
        for to in self.nodes[node].followers.clone() {
            self.after(self.latency(node, to), Event::PieceMapUpdate { from: node, to, update: update.clone() });
        }
        if self.nodes[node].missing == 0 {
            self.nodes[node].followers.clear();
        }
    }

    fn handle_follow(&mut self, from: usize, to: usize, begins: bool) {
        let this = &mut self.nodes[to];
        if !begins {
            this.followers.remove(&from);
        } else if this.is_alive {
            let is_whole = this.is_whole();
            let update = if is_whole { PieceMapUpdate::HaveAll } else { PieceMapUpdate::Map(this.pieces.clone()) };
            if !is_whole {
                this.followers.insert(from);
            }
            self.after(self.latency(from, to), Event::PieceMapUpdate { from: to, to: from, update: Rc::new(update) });
        }
    }

    fn handle_cancel(&mut self, from: usize, at: usize, request: PieceRequestId) {
        let this = &mut self.nodes[at];
        let Some((ticket, stream)) = this.served_requests.remove(&(from, request)) else { return };
        this.queued_requests.remove(&ticket);
        this.slots.remove(ticket);
        if let Some(stream) = stream {
            self.network.close(stream);
        }
        self.serve(at);
    }

    /// Handles a node's detection that a peer is dead.
    fn handle_dead_peer(&mut self, from: usize, to: usize) {
        if !self.nodes[to].is_alive || self.nodes[to].done_at.is_some() {
            return;
        }
        let (peer, now) = (self.nodes[from].peer, self.instant());
        self.nodes[to].picker.exclude_peer(peer, now + Duration::from_secs(600));
        self.nodes[to].followers.remove(&from);
        self.update_providers(to);
        self.drive(to);
    }

    fn claim_if_due(&mut self, node: usize) {
        let this = &mut self.nodes[node];
        let at = this.zone_leader.claim_due();
        if !this.is_claiming && at.is_some_and(|at| at <= self.instant()) {
            self.nodes[node].is_claiming = true;
            self.ask_server(node, None);
        }
    }

    fn ask_server(&mut self, node: usize, step: Option<LeaseStep>) {
        let later = self.rng.random_range(5_000..50_000);
        self.after(later, Event::Claim { node, step });
    }

    /// Handles a read or write of the Lease at the API server.
    fn handle_claim(&mut self, node: usize, write: Option<LeaseStep>) {
        let zone = self.nodes[node].zone.clone().expect("a claiming node has a zone");
        let step = write.is_none().then(|| self.server.read(&zone, node, self.now));
        if let Some(step) = step.filter(|step| *step != LeaseStep::Skip && self.nodes[node].done_at.is_none()) {
            return self.ask_server(node, Some(step));
        }
        let wrote = write.is_some_and(|step| self.server.write(&zone, node, &step, self.now));
        let holder = self.server.holder(&zone, |holder| self.nodes[holder].peer);
        let now = self.instant();
        let this = &mut self.nodes[node];
        this.has_claim |= wrote;
        this.is_claiming = false;
        this.zone_leader.record_claim_holder(holder, now);
        if wrote && this.done_at.is_some() {
            self.server.release(&zone);
        }
        self.drive(node);
    }
}
