//! A few agents in one place: everything is delivered at once and in order, gossip floods. For sentences about the protocol; how it
//! behaves on a network is the simulation's.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::super::{AskId, Doubt, LinkId, Notary, Output, Own, PROBE, Protocol, TICK, Verdict, Vouched};
use crate::decide::inventory::Inventory;
use crate::model::{ContentChange, Credential, Gossip, Item, Peer, PeerId, Question, Reply, Signature};
use crate::oci::Digest;

/// Signs with the digest of key and text, which everybody here could do and only liars do.
#[derive(Debug, Clone)]
pub(super) struct Stamp(PeerId, Clock);

/// Since the village was founded.
type Clock = Rc<Cell<Duration>>;

pub(super) fn stamp(by: PeerId, message: &[u8]) -> Signature {
    let digest = *Digest::of(&[by.public_key().as_slice(), message].concat()).as_bytes();
    Signature(digest, digest)
}

impl Notary for Stamp {
    fn sign(&self, message: &[u8]) -> Signature {
        stamp(self.0, message)
    }

    fn is_signed(&self, by: PeerId, message: &[u8], signature: &Signature) -> bool {
        *signature == stamp(by, message)
    }

    /// `good SECONDS` admits until then, by the village's clock; `good SECONDS POD` says whose it is.
    fn vouch(&self, _: PeerId, credential: &Credential) -> Result<Vouched, Doubt> {
        let mut words = credential.expose().split(' ').filter(|word| *word != "good");
        let until = words.next().and_then(|until| until.parse().ok()).ok_or(Doubt::Denied)?;
        let life = Duration::from_secs(until).checked_sub(self.1.get()).ok_or(Doubt::Denied)?;
        Ok(Vouched { node: None, pod: words.next().map(Into::into), life })
    }
}

pub(super) struct House {
    pub(super) protocol: Protocol<Stamp>,
    pub(super) table: Inventory,
    pub(super) up: BTreeSet<PeerId>,
    pub(super) blamed: Vec<(PeerId, &'static str, bool)>,
    pub(super) refused: Vec<&'static str>,
    pub(super) questions: Vec<Question>,
    allowed: BTreeSet<PeerId>,
    seen: BTreeSet<Vec<u8>>,
    /// Neither sends nor receives, and closes nothing.
    pub(super) is_cut_off: bool,
    is_dead: bool,
}

/// The agents, by number.
pub(super) struct Village {
    pub(super) houses: BTreeMap<u8, House>,
    pub(super) now: Instant,
    clock: Clock,
    links: BTreeMap<LinkId, (u8, u8)>,
    next_link: LinkId,
    ticks: u32,
    /// Changes what somebody answers.
    pub(super) liar: Option<fn(u8, Reply) -> Reply>,
}

pub(super) fn id(number: u8) -> PeerId {
    PeerId::from_public_key([number; 32])
}

pub(super) fn blob(number: u8) -> Item {
    Item::Blob(Digest::of(&[number]))
}

pub(super) fn peer(number: u8) -> Peer {
    let address = ([10, 0, 0, number], 4701).into();
    Peer { id: id(number), node: format!("n{number}").parse().unwrap(), zone: None, transfer: address, gossip: address }
}

fn encoded(message: &Gossip) -> Vec<u8> {
    format!("{message:?}").into_bytes()
}

impl Village {
    /// Agents that have introduced themselves and know nobody.
    pub(super) fn of(numbers: impl IntoIterator<Item = u8>) -> Self {
        let mut village = Self {
            houses: BTreeMap::new(),
            now: Instant::now(),
            clock: Clock::default(),
            links: BTreeMap::new(),
            next_link: 0,
            ticks: 0,
            liar: None,
        };
        numbers.into_iter().for_each(|number| village.build(number, 1, "good 86400"));
        village
    }

    /// Agents that all know each other and have told what they hold: a blob of their own each.
    pub(super) fn grown(numbers: std::ops::RangeInclusive<u8>) -> Self {
        let mut village = Self::of(numbers.clone());
        let first = *numbers.start();
        for number in numbers.clone().skip(1) {
            village.meet(first, number);
        }
        for number in numbers {
            village.adds(number, [blob(number)]);
        }
        village.pass(Duration::from_secs(30));
        village
    }

    pub(super) fn build(&mut self, number: u8, epoch: u64, credential: &str) {
        let peer = peer(number);
        let own = Own { peer: peer.id, epoch, node: peer.node, release: "0.1.0".parse().unwrap() };
        let mut protocol = Protocol::new(own, Stamp(peer.id, Rc::clone(&self.clock)), number.into(), self.now);
        protocol.introduce(Credential::new(credential.into()), peer.transfer, peer.gossip, None, self.now);
        let house = House {
            protocol,
            table: Inventory::default(),
            up: BTreeSet::new(),
            blamed: Vec::new(),
            refused: Vec::new(),
            questions: Vec::new(),
            allowed: BTreeSet::new(),
            seen: BTreeSet::new(),
            is_cut_off: false,
            is_dead: false,
        };
        self.houses.insert(number, house);
    }

    pub(super) fn house(&mut self, number: u8) -> &mut House {
        self.houses.get_mut(&number).unwrap()
    }

    /// The one greets the other at its door.
    pub(super) fn meet(&mut self, a: u8, b: u8) {
        let now = self.now;
        for (one, other) in [(a, b), (b, a)] {
            let house = self.house(one);
            house.protocol.admitted(peer(other), Duration::from_secs(86_400), &mut house.table, now);
        }
        self.settle();
    }

    pub(super) fn adds(&mut self, number: u8, items: impl IntoIterator<Item = Item>) {
        self.house(number).protocol.announce(items.into_iter().map(ContentChange::Added).collect());
    }

    /// Who, according to the one, holds the blob of that number.
    pub(super) fn holders(&self, according_to: u8, number: u8) -> Vec<PeerId> {
        self.houses[&according_to].table.holders(Digest::of(&[number]))
    }

    /// Whom this one takes for alive.
    pub(super) fn up(&self, according_to: u8) -> Vec<u8> {
        self.houses[&according_to].up.iter().map(|peer| peer.public_key()[0]).collect()
    }

    /// Their connection ends, and neither thinks anything of it.
    pub(super) fn part(&mut self, a: u8, b: u8) {
        let ended: Vec<_> = self.links.iter().filter(|(_, ends)| **ends == (a, b) || **ends == (b, a)).collect();
        for link in ended.into_iter().map(|(link, _)| *link).collect::<Vec<_>>() {
            self.links.remove(&link);
            let now = self.now;
            for (one, other) in [(a, b), (b, a)] {
                let house = self.house(one);
                house.protocol.asked(id(other), Question::Part, &house.table, now);
                house.protocol.closed(link, id(other), now);
            }
        }
    }

    /// Another connection between them, over which nobody answers.
    pub(super) fn doubly_linked(&mut self, a: u8, b: u8) {
        self.next_link += 1;
        let (link, now) = (self.next_link, self.now);
        self.links.insert(link, (a, b));
        self.house(a).protocol.opened(link, id(b), now);
        self.house(b).protocol.opened(link, id(a), now);
    }

    /// Since it was founded.
    pub(super) fn elapsed(&self) -> Duration {
        self.clock.get()
    }

    /// The process ends and the system closes its connections.
    pub(super) fn kill(&mut self, number: u8) {
        self.house(number).is_dead = true;
        let ended: Vec<_> = self.links.iter().filter(|(_, ends)| ends.0 == number || ends.1 == number).collect();
        let ended: Vec<_> = ended.into_iter().map(|(link, ends)| (*link, *ends)).collect();
        for (link, (a, b)) in ended {
            self.links.remove(&link);
            let now = self.now;
            let other = if a == number { b } else { a };
            self.house(other).protocol.closed(link, id(number), now);
        }
        self.settle();
    }

    pub(super) fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now += TICK;
            self.clock.set(self.clock.get() + TICK);
            self.ticks += 1;
            let now = self.now;
            for house in self.houses.values_mut().filter(|house| !house.is_dead) {
                house.protocol.tick(&mut house.table, now);
            }
            self.settle();
            if self.ticks.is_multiple_of((PROBE.as_millis() / TICK.as_millis()) as u32) {
                for (link, (a, b)) in self.links.clone() {
                    if self.hears(a, b) {
                        for (one, other) in [(a, b), (b, a)] {
                            let house = self.houses.get_mut(&one).unwrap();
                            house.protocol.heard(link, id(other), &mut house.table, now);
                        }
                    }
                }
                self.settle();
            }
        }
    }

    fn hears(&self, a: u8, b: u8) -> bool {
        [a, b].iter().all(|number| !self.houses[number].is_cut_off && !self.houses[number].is_dead)
    }

    /// Somebody's neighbours hear this from it, whether it should have said it or not.
    pub(super) fn says(&mut self, number: u8, message: Gossip) {
        self.spread(number, message);
        self.settle();
    }

    pub(super) fn settle(&mut self) {
        let mut busy = true;
        while busy {
            busy = false;
            for number in self.houses.keys().copied().collect::<Vec<_>>() {
                while let Some(output) = self.house(number).protocol.next() {
                    busy = true;
                    self.carry_out(number, output);
                }
            }
        }
    }

    fn carry_out(&mut self, number: u8, output: Output) {
        let now = self.now;
        match output {
            Output::Publish(message) => self.spread(number, message),
            Output::Ask(ask, of, question) => self.ask(number, ask, of, question),
            Output::Greet(peer) => {
                let other = peer.id.public_key()[0];
                if self.hears(number, other) {
                    self.meet_quietly(number, other);
                } else {
                    self.unreachable(number, peer.id);
                }
            }
            Output::Dial(peer) => {
                let other = peer.id.public_key()[0];
                let is_let_in = self.houses[&other].allowed.contains(&id(number));
                if self.hears(number, other) && is_let_in {
                    self.next_link += 1;
                    let link = self.next_link;
                    self.links.insert(link, (number, other));
                    self.house(number).protocol.opened(link, peer.id, now);
                    self.house(other).protocol.opened(link, id(number), now);
                } else {
                    self.unreachable(number, peer.id);
                }
            }
            Output::Close(link, peer) => {
                self.links.remove(&link);
                let other = peer.public_key()[0];
                if self.hears(number, other) {
                    self.house(other).protocol.closed(link, id(number), now);
                }
            }
            Output::Allow(peer) => drop(self.house(number).allowed.insert(peer)),
            Output::Deny(peer) => drop(self.house(number).allowed.remove(&peer)),
            Output::Up(peer) => drop(self.house(number).up.insert(peer.id)),
            Output::Down(peer, _) => drop(self.house(number).up.remove(&peer)),
            Output::SharedKey(_) => {}
            Output::Blame { peer, fault, banned } => self.house(number).blamed.push((peer, fault, banned.is_some())),
        }
    }

    fn meet_quietly(&mut self, a: u8, b: u8) {
        let now = self.now;
        for (one, other) in [(b, a), (a, b)] {
            let house = self.house(one);
            house.protocol.admitted(peer(other), Duration::from_secs(86_400), &mut house.table, now);
        }
    }

    fn unreachable(&mut self, number: u8, other: PeerId) {
        let now = self.now;
        let house = self.house(number);
        house.protocol.unreachable(other, &mut house.table, now);
    }

    fn ask(&mut self, number: u8, ask: AskId, of: PeerId, question: Question) {
        let now = self.now;
        let other = of.public_key()[0];
        let is_linked = self.links.values().any(|ends| *ends == (number, other) || *ends == (other, number));
        self.house(number).questions.push(question.clone());
        if !self.hears(number, other) || !is_linked {
            return self.house(number).protocol.unanswered(ask, now);
        }
        let house = self.house(other);
        let reply = house.protocol.asked(id(number), question, &house.table, now);
        let reply = self.liar.map_or(reply.clone(), |lie| lie(other, reply));
        let house = self.house(number);
        house.protocol.answered(ask, reply, &mut house.table, now);
    }

    /// Floods: whoever accepts it for the first time passes it on.
    fn spread(&mut self, from: u8, message: Gossip) {
        let text = encoded(&message);
        self.house(from).seen.insert(text.clone());
        let mut holders = VecDeque::from([from]);
        while let Some(holder) = holders.pop_front() {
            let ends = self.links.values().filter_map(|(a, b)| match (*a == holder, *b == holder) {
                (true, _) => Some(*b),
                (_, true) => Some(*a),
                _ => None,
            });
            for other in ends.collect::<BTreeSet<_>>() {
                let now = self.now;
                if !self.hears(holder, other) || !self.house(other).seen.insert(text.clone()) {
                    continue;
                }
                let house = self.house(other);
                match house.protocol.gossip(id(holder), message.clone(), &mut house.table, now) {
                    Verdict::Accept => holders.push_back(other),
                    Verdict::Ignore(_) => {}
                    Verdict::Reject(fault) => house.refused.push(fault),
                }
            }
        }
    }
}
