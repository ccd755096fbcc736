//! What nodes do when something happens.

use std::rc::Rc;
use std::time::Duration;

use lighterman::decide::claim::Step;
use lighterman::decide::pieces::{AskId, End, Neighbour};
use lighterman::model::{Availability, Order};
use rand::Rng;

use super::network::{Sending, StreamId};
use super::node::{Kind, Node};
use super::world::{Event, World};

/// Follow updates are gathered for so long, in microseconds.
const BATCH: u64 = 50_000;
/// A node that drips sends a chunk so often.
const DRIP: u64 = 1_000_000;

impl World {
    pub(super) fn happens(&mut self, event: Event) {
        match event {
            Event::Gossip { node, round } => self.gossips(node, round),
            Event::Wake { node } => {
                if self.nodes[node].wake_at <= self.now {
                    self.nodes[node].wake_at = u64::MAX;
                    self.drive(node);
                }
            }
            Event::Request { from, to, ask, order } => self.requested(from, to, ask, order),
            Event::Refused { to, ask, how } => {
                if self.nodes[to].asks.remove(&ask).is_some() {
                    let now = self.instant();
                    self.nodes[to].pool.ends(ask, how, now);
                    self.drive(to);
                }
            }
            Event::Dropped { from, at, ask } => self.dropped(from, at, ask),
            Event::Follow { from, to, begins } => self.followed(from, to, begins),
            Event::Word { from, to, word } => {
                if self.nodes[to].done_at.is_none() && self.nodes[to].is_alive {
                    let (peer, digest, now) = (self.nodes[from].peer, self.digest, self.instant());
                    self.nodes[to].pool.hears(peer, digest, &word, now);
                    self.drive(to);
                }
            }
            Event::Gone { from, to } => self.gone(from, to),
            Event::Flush { node } => self.flush(node),
            Event::LinkFree { node } => {
                self.network.sent(node);
                self.send(node);
            }
            Event::Received { stream, from, to, ask, piece, bytes } => {
                self.network.received(stream);
                if self.nodes[from].is_alive {
                    self.send(from);
                }
                self.received(from, to, ask, piece, bytes);
            }
            Event::Drip { stream } => {
                self.network.queue(stream);
                let node = self.network.stream(stream).from;
                self.send(node);
            }
            Event::Claim { node, step } => self.claims(node, step),
        }
    }

    /// Does what a node's pool wants done.
    pub(super) fn drive(&mut self, node: usize) {
        let this = &self.nodes[node];
        if !this.is_alive || node == 0 || this.kind == Kind::Liar {
            return;
        }
        let now = self.instant();
        if this.zone.is_some() && this.done_at.is_none() {
            let this = &mut self.nodes[node];
            let may = this.crossing.may_cross(now);
            this.pool.cross(may);
            self.think_of_claiming(node);
        }
        for change in self.nodes[node].pool.neighbours(now) {
            let (Neighbour::Follow { peer, .. } | Neighbour::Leave { peer, .. }) = change;
            let (to, begins) = (self.numbers[&peer], matches!(change, Neighbour::Follow { .. }));
            self.after(self.latency(node, to), Event::Follow { from: node, to, begins });
        }
        while let Some(ask) = self.nodes[node].pool.next(now) {
            let to = self.numbers[&ask.order.peer];
            self.nodes[node].asks.insert(ask.id, (to, 0));
            self.after(self.latency(node, to), Event::Request { from: node, to, ask: ask.id, order: ask.order });
        }
        for ask in self.nodes[node].pool.cancels() {
            if let Some((at, came)) = self.nodes[node].asks.remove(&ask) {
                self.nodes[node].wasted += came;
                self.after(self.latency(node, at), Event::Dropped { from: node, at, ask });
            }
        }
        let this = &self.nodes[node];
        let wakes = [this.pool.wake_at(), this.crossing.wake_at(), this.crossing.claims_at()];
        let wakes = wakes.into_iter().take(if this.zone.is_some() { 3 } else { 1 });
        let wake = wakes.flatten().map(|at| self.micros(at)).filter(|at| *at > self.now).min();
        if let Some(wake) = wake.filter(|wake| *wake < this.wake_at && this.done_at.is_none()) {
            self.nodes[node].wake_at = wake;
            self.after(wake - self.now, Event::Wake { node });
        }
    }

    fn requested(&mut self, from: usize, to: usize, ask: AskId, order: Order) {
        if !self.nodes[to].is_alive {
            return;
        }
        let (client, pieces) = (self.nodes[from].peer, self.cut.pieces());
        let this = &mut self.nodes[to];
        match this.slots.enqueue(client, order.digest, pieces) {
            Ok(ticket) => {
                this.tickets.insert(ticket, (from, ask, order));
                this.asked.insert((from, ask), (ticket, None));
                self.serve(to);
            }
            Err(_) => self.after(self.latency(from, to), Event::Refused { to: from, ask, how: End::Busy }),
        }
    }

    fn serve(&mut self, node: usize) {
        while let Some(ticket) = self.nodes[node].slots.turn() {
            let Some((client, ask, order)) = self.nodes[node].tickets.remove(&ticket) else { continue };
            let stream = self.network.open(node, client, ask, ticket, order.choice, order.most);
            self.nodes[node].asked.insert((client, ask), (ticket, Some(stream)));
            self.begin(node, stream);
        }
        self.send(node);
    }

    /// Chooses the next piece of an answer, or ends it.
    fn begin(&mut self, node: usize, id: StreamId) {
        let stream = self.network.stream(id);
        let (digest, choice, left) = (self.digest, stream.choice.clone(), stream.left);
        let this = &mut self.nodes[node];
        let piece = if left == 0 {
            None
        } else {
            let Node { sent, held, kind, .. } = this;
            let has = |piece: u32| *kind == Kind::Liar || held.get(piece as usize);
            sent.choose(digest, &choice, 1, has).first().copied()
        };
        let length = piece.map_or(0, |piece| self.cut.length(piece as usize));
        let stream = self.network.stream(id);
        let (to, ask, ticket) = (stream.to, stream.ask, stream.ticket);
        match piece {
            Some(piece) => {
                stream.choice.retain(|one| *one != piece);
                (stream.piece, stream.unsent, stream.left) = (piece, length, left - 1);
                if self.nodes[node].kind == Kind::Drips {
                    self.after(DRIP, Event::Drip { stream: id });
                } else {
                    self.network.queue(id);
                }
            }
            None => {
                self.network.close(id);
                self.nodes[node].asked.remove(&(to, ask));
                self.nodes[node].slots.done(ticket);
                // Behind all of its bytes.
                let later = if left == 0 { 200_000 } else { self.latency(node, to) };
                self.after(later, Event::Refused { to, ask, how: End::Done });
            }
        }
    }

    fn send(&mut self, node: usize) {
        if !self.nodes[node].is_alive {
            return;
        }
        let (now, zones) = (self.now, &self.nodes);
        let latency = |one: usize, other: usize| if zones[one].zone == zones[other].zone { 500 } else { 2000 };
        let Some(sending) = self.network.send(node, now, latency) else { return };
        let Sending { stream: id, piece, bytes, sent_at, received_at } = sending;
        let stream = self.network.stream(id);
        let (to, ask, ticket, unsent) = (stream.to, stream.ask, stream.ticket, stream.unsent);
        self.nodes[node].slots.sent(ticket, bytes);
        self.nodes[node].bytes_sent += bytes;
        if self.nodes[node].zone != self.nodes[to].zone {
            self.crossed += bytes;
        }
        self.after(sent_at - now, Event::LinkFree { node });
        self.after(received_at - now, Event::Received { stream: id, from: node, to, ask, piece, bytes });
        if unsent == 0 {
            self.begin(node, id);
            self.serve(node);
        }
    }

    fn received(&mut self, from: usize, to: usize, ask: AskId, piece: u32, bytes: u64) {
        let now = self.instant();
        let length = self.cut.length(piece as usize);
        let this = &mut self.nodes[to];
        let Some((_, came)) = this.asks.get_mut(&ask).filter(|_| this.is_alive) else {
            this.wasted += bytes;
            return;
        };
        if *came == 0 {
            this.pool.begins(ask, piece, now);
        }
        *came += bytes;
        this.pool.brings(ask, bytes, now);
        if *came < length {
            return;
        }
        *came = 0;
        this.pool.has(ask, piece, now);
        if self.nodes[from].kind == Kind::Liar {
            let (liar, digest) = (self.nodes[from].peer, self.digest);
            let this = &mut self.nodes[to];
            this.pool.unfit(digest, piece);
            this.pool.forget(liar, now + Duration::from_secs(600));
        } else {
            let (peer, digest) = (self.nodes[from].peer, self.digest);
            self.nodes[to].pool.fits(peer, digest);
            self.arrives(from, to, piece);
        }
        self.drive(to);
    }

    fn arrives(&mut self, from: usize, to: usize, piece: u32) {
        let (now, half) = (self.instant(), (self.now / 500_000) as usize);
        let is_near = self.nodes[from].zone == self.nodes[to].zone;
        let this = &mut self.nodes[to];
        if is_near {
            this.crossing.came(now);
        }
        if this.held.get(piece as usize) {
            this.wasted += self.cut.length(piece as usize);
            return;
        }
        this.held.set(piece as usize);
        this.missing -= 1;
        this.news.push(piece);
        let (is_first, is_done) = (this.news.len() == 1, this.missing == 0);
        if is_done {
            this.done_at = Some(self.now);
            if this.claims {
                let zone = this.zone.clone().expect("who claims has one");
                self.server.release(&zone);
            }
        }
        if is_first {
            self.after(BATCH, Event::Flush { node: to });
        }
        self.course.resize(self.course.len().max(half + 1), 0);
        self.course[half] += self.cut.length(piece as usize);
    }

    fn flush(&mut self, node: usize) {
        let this = &mut self.nodes[node];
        let news = std::mem::take(&mut this.news);
        let word = Rc::new(if this.missing == 0 { Availability::Whole } else { Availability::Also(news) });
        for to in self.nodes[node].followers.clone() {
            self.after(self.latency(node, to), Event::Word { from: node, to, word: word.clone() });
        }
        if self.nodes[node].missing == 0 {
            self.nodes[node].followers.clear();
        }
    }

    fn followed(&mut self, from: usize, to: usize, begins: bool) {
        let this = &mut self.nodes[to];
        if !begins {
            this.followers.remove(&from);
        } else if this.is_alive {
            let is_whole = this.is_whole();
            let word = if is_whole { Availability::Whole } else { Availability::These(this.held.clone()) };
            if !is_whole {
                this.followers.insert(from);
            }
            self.after(self.latency(from, to), Event::Word { from: to, to: from, word: Rc::new(word) });
        }
    }

    fn dropped(&mut self, from: usize, at: usize, ask: AskId) {
        let this = &mut self.nodes[at];
        let Some((ticket, stream)) = this.asked.remove(&(from, ask)) else { return };
        this.tickets.remove(&ticket);
        this.slots.done(ticket);
        if let Some(stream) = stream {
            self.network.close(stream);
        }
        self.serve(at);
    }

    /// A node finds out that another is gone.
    fn gone(&mut self, from: usize, to: usize) {
        if !self.nodes[to].is_alive || self.nodes[to].done_at.is_some() {
            return;
        }
        let (peer, now) = (self.nodes[from].peer, self.instant());
        self.nodes[to].pool.forget(peer, now + Duration::from_secs(600));
        self.nodes[to].followers.remove(&from);
        self.learns(to);
        self.drive(to);
    }

    fn think_of_claiming(&mut self, node: usize) {
        let this = &mut self.nodes[node];
        let at = this.crossing.claims_at();
        if !this.is_claiming && at.is_some_and(|at| at <= self.instant()) {
            self.nodes[node].is_claiming = true;
            self.ask_server(node, None);
        }
    }

    fn ask_server(&mut self, node: usize, step: Option<Step>) {
        let later = self.rng.random_range(5_000..50_000);
        self.after(later, Event::Claim { node, step });
    }

    /// The API server looks at the Lease, or writes it.
    fn claims(&mut self, node: usize, write: Option<Step>) {
        let zone = self.nodes[node].zone.clone().expect("who claims has one");
        let step = write.is_none().then(|| self.server.read(&zone, node, self.now));
        if let Some(step) = step.filter(|step| *step != Step::Leave && self.nodes[node].done_at.is_none()) {
            return self.ask_server(node, Some(step));
        }
        let wrote = write.is_some_and(|step| self.server.write(&zone, node, &step, self.now));
        let holder = self.server.holder(&zone, |holder| self.nodes[holder].peer);
        let now = self.instant();
        let this = &mut self.nodes[node];
        this.claims |= wrote;
        this.is_claiming = false;
        this.crossing.claimed(holder, now);
        if wrote && this.done_at.is_some() {
            self.server.release(&zone);
        }
        self.drive(node);
    }
}
