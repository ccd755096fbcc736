//! Who is a member: introductions, admission at the door, and what follows for whom we connect to.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::Rng;
use rand::seq::IteratorRandom;

use super::conduct::WORDS;
use super::roster::{Life, Member};
use super::{Doubt, GRAFTED, LinkId, Notary, Output, Presence, Protocol, Verdict, Vouched};
use crate::decide::inventory::Inventory;
use crate::model::{Credential, Gossip, Introduction, Peer, PeerId, Profile, Zone};

/// How long a member stays one while it cannot be told whether its credential is still good.
const UNDECIDED: Duration = Duration::from_secs(60);

/// How long a member that is held for dead is known, so that it need not introduce itself and tell everything anew: longer than a
/// node's restart.
const RETENTION: Duration = Duration::from_secs(600);

/// How long one that answered may take to refute what others said of it; it learns of that as soon as it is connected to anybody.
const UNREFUTED: Duration = Duration::from_secs(10);

/// How long the side with the larger key leaves the dial to the other, to have one connection rather than two.
const COURTESY: Duration = Duration::from_secs(1);

/// Of one that could not be reached so often in a row, another one takes the place, and nothing is fetched from it.
pub(super) const GIVEN_UP: u32 = 3;

/// Members that have not introduced themselves yet; an honest one does within seconds.
const MAX_STRANGERS: usize = 256;

/// Keys of one pod that are believed at a time: the one that it has, and one from before its key file was lost.
const KEYS_OF_A_POD: usize = 2;

/// "As long as anybody asks": a life that never ends would overflow an instant.
const LONGEST_LIFE: Duration = Duration::from_secs(10 * 365 * 86_400);

impl<N: Notary> Protocol<N> {
    /// What others need to know of this agent; without it nothing is said. Said anew when it changed.
    pub fn introduce(
        &mut self,
        credential: Credential,
        transfer: SocketAddr,
        gossip: SocketAddr,
        zone: Option<Zone>,
        now: Instant,
    ) {
        let presence = Presence { credential, transfer, gossip, zone };
        if self.presence.as_ref() != Some(&presence) {
            self.presence = Some(presence);
            self.say(now);
        }
    }

    /// Tells who we are, in a new version.
    fn say(&mut self, now: Instant) {
        let Some(Presence { credential, transfer, gossip, zone }) = self.presence.clone() else { return };
        let version = self.introduction.as_ref().map_or(0, |before| before.profile.version) + 1;
        let profile = Profile {
            peer: self.own.peer,
            epoch: self.log.epoch(),
            version,
            node: self.own.node.clone(),
            zone,
            release: self.own.release.clone(),
            transfer,
            gossip,
        };
        let mut introduction = Introduction { profile, credential, signature: [0; 64].into() };
        introduction.signature = self.notary.sign(&introduction.signed());
        self.introduction = Some(introduction.clone());
        self.introduce_at = None;
        if self.roster.neighbours().next().is_some() {
            self.output(Output::Publish(Gossip::Introduction(introduction)));
        } else {
            self.introduce_at = Some(now + GRAFTED);
        }
    }

    /// Repeats it where nobody could hear it.
    pub(super) fn say_again(&mut self, now: Instant) {
        let heard = self.roster.neighbours().next().is_some();
        if heard && self.introduce_at.is_some_and(|at| at <= now) {
            self.say(now);
        }
    }

    /// The door let this peer in: it greeted us or was greeted. For `life` it may connect.
    pub fn admitted(&mut self, peer: Peer, life: Duration, table: &mut Inventory, now: Instant) {
        let id = peer.id;
        if id == self.own.peer {
            return;
        }
        if self.roster.get(id).is_none() && self.roster.is_full() {
            self.over_limit += 1;
            return;
        }
        if self.roster.get(id).is_none() {
            self.make_room_for_a_stranger(table, now);
        }
        let mine = self.own.peer;
        let member = self.roster.members.entry(id).or_insert_with(|| Member::new(peer.clone()));
        if member.conduct.is_banned(now) {
            member.links.greeted();
            return;
        }
        let was_trying = member.links.is_trying();
        member.links.greeted();
        member.links.try_from(if was_trying || mine < id { now } else { now + COURTESY });
        if member.introduction.is_none() {
            member.peer = peer;
        }
        member.answers(mine, now);
        let was_admitted = member.is_admitted(now);
        member.admitted_until = Some(now + life.min(LONGEST_LIFE));
        if !was_admitted {
            self.output(Output::Allow(id));
        }
        self.roster.touched(id);
        self.judge(id, table, now);
        self.chosen_is_stale = true;
        self.keep_neighbours(now);
    }

    /// It could not be greeted or dialled.
    pub fn unreachable(&mut self, peer: PeerId, table: &mut Inventory, now: Instant) {
        let jitter = self.jitter();
        let Some(member) = self.roster.get_mut(peer) else { return };
        let was_lost = member.links.failed(now, jitter);
        if was_lost || (member.is_up && member.links.attempts() >= GIVEN_UP) {
            self.accuse(peer, "cannot be dialled any more", table, now);
        }
        self.chosen_is_stale = true;
    }

    /// It answered, and would not have us or be had.
    pub fn declined(&mut self, peer: PeerId, now: Instant) {
        let jitter = self.jitter();
        if let Some(member) = self.roster.get_mut(peer) {
            member.links.declined(now, jitter);
        }
        self.chosen_is_stale = true;
    }

    /// It may connect no more, for a reason that the driver knows.
    pub fn dismissed(&mut self, peer: PeerId, table: &mut Inventory, now: Instant) {
        if self.roster.get(peer).is_some() {
            self.take_down(peer, "dismissed", table);
            self.drop_member(peer, table, now);
        }
    }

    /// A connection with an allowed peer is open, whoever dialled.
    pub fn opened(&mut self, link: LinkId, peer: PeerId, now: Instant) {
        match self.roster.get_mut(peer) {
            Some(member) if member.is_admitted(now) => {
                member.links.opened(link);
                self.roster.watch(peer);
            }
            _ => self.output(Output::Close(link, peer)),
        }
    }

    /// Somebody's introduction, by gossip.
    pub(super) fn introduction(&mut self, introduction: Introduction, table: &mut Inventory, now: Instant) -> Verdict {
        let profile = &introduction.profile;
        let peer = profile.peer;
        if peer != self.own.peer {
            if self.member(peer).is_some_and(|member| member.conduct.is_banned(now)) {
                return Verdict::Ignore("banned");
            }
            let known = self.member(peer).map_or((0, 0), Member::version);
            if (profile.epoch, profile.version) <= known {
                return Verdict::Ignore("known");
            }
            if self.member(peer).is_none() && self.roster.is_full() {
                self.over_limit += 1;
                return Verdict::Ignore("full");
            }
        }
        if !self.notary.is_signed(peer, &introduction.signed(), &introduction.signature) {
            return Verdict::Reject("forged");
        }
        if peer == self.own.peer {
            if profile.node != self.own.node {
                self.output(Output::SharedKey(profile.node.clone()));
            }
            self.meet_my_past(&introduction, now);
            return Verdict::Ignore("own");
        }
        let is_within = self.roster.get_mut(peer).is_none_or(|member| member.conduct.words.take(&WORDS, now));
        if !is_within {
            return Verdict::Ignore("too_many");
        }
        match self.notary.vouch(peer, &introduction.credential) {
            Ok(vouched) if self.has_newer_keys(&introduction.profile, vouched.pod.as_deref()) => {
                Verdict::Ignore("newer_keys")
            }
            Ok(vouched) => {
                self.learn(introduction, vouched, table, now);
                self.unknown.remove(&peer);
                Verdict::Accept
            }
            // It may have expired on its way, or clocks differ.
            Err(Doubt::Denied) => Verdict::Ignore("not_admitted"),
            Err(Doubt::CannotTell) => Verdict::Ignore("undecided"),
        }
    }

    /// Our own word of an earlier process whose clock was ahead: nobody would believe what we say now.
    fn meet_my_past(&mut self, introduction: &Introduction, now: Instant) {
        let epoch = introduction.profile.epoch;
        let ahead = epoch > self.log.epoch()
            || (epoch == self.log.epoch()
                && introduction.profile.version > self.introduction.as_ref().map_or(0, |known| known.profile.version));
        // Not simply the next: another process of ours may have come to the same one before.
        let leap = self.rng.random_range(1..1_000_000);
        if ahead && let Some(next) = epoch.checked_add(leap) {
            self.log.begin_again(next);
            self.introduction = None;
            self.incarnation = 0;
            self.say(now);
        }
    }

    fn learn(&mut self, introduction: Introduction, vouched: Vouched, table: &mut Inventory, now: Instant) {
        let Profile { peer: id, epoch, version: _, node, zone, release: _, transfer, gossip } =
            introduction.profile.clone();
        let Vouched { node: vouched_node, pod, life } = vouched;
        let peer = Peer { id, node: vouched_node.unwrap_or(node), zone, transfer, gossip };
        self.make_room_for(&peer, pod.as_deref(), table, now);
        let member = self.roster.members.entry(id).or_insert_with(|| Member::new(peer.clone()));
        let new_process = member.epoch() != epoch;
        let moved = member.peer != peer;
        if new_process {
            self.take_down(id, "started again", table);
            self.behind.remove(&id);
            table.forget(id);
        }
        let Some(member) = self.roster.get_mut(id) else { return };
        member.introduction = Some(introduction);
        member.pod = pod;
        member.vouched_until = Some(now + life.min(LONGEST_LIFE));
        member.peer = peer;
        if new_process {
            (member.log, member.refutation) = Default::default();
            member.accusers.clear();
            member.life = Life::Alive;
            member.links.try_from(now);
        }
        self.chosen_is_stale |= moved || new_process;
        if moved && std::mem::take(&mut member.is_up) {
            // Told again, with where it is now.
            self.judge(id, table, now);
            if self.member(id).is_some_and(|member| !member.is_up) {
                table.hide(id);
                self.output(Output::Down(id, "its credential has expired"));
            }
        }
        self.judge(id, table, now);
        self.roster.touched(id);
    }

    /// Those who came in at the door and never introduced themselves may be few: whoever can have credentials for key after key would
    /// take the place of all others.
    fn make_room_for_a_stranger(&mut self, table: &mut Inventory, now: Instant) {
        let is_stranger = |member: &&Member| member.introduction.is_none();
        let strangers = self.roster.members.values().filter(is_stranger);
        if strangers.clone().count() >= MAX_STRANGERS
            && let Some(peer) = strangers.map(|member| member.peer.id).choose(&mut self.rng)
        {
            self.drop_member(peer, table, now);
        }
    }

    /// Whether as many keys of the pod as are believed are newer than this one.
    fn has_newer_keys(&self, profile: &Profile, pod: Option<&str>) -> bool {
        let of_pod = |member: &&Member| pod.is_some() && member.pod.as_deref() == pod && member.peer.id != profile.peer;
        let newer = |member: &&Member| (member.epoch(), member.peer.id) > (profile.epoch, profile.peer);
        self.roster.members.values().filter(of_pod).filter(newer).count() >= KEYS_OF_A_POD
    }

    /// Whoever has a pod's rights can have credentials for one key after another: only the last few of one pod count.
    fn make_room_for(&mut self, peer: &Peer, pod: Option<&str>, table: &mut Inventory, now: Instant) {
        let (id, Some(pod)) = (peer.id, pod) else { return };
        let of_pod = self.roster.members.values().filter(|member| member.pod.as_deref() == Some(pod));
        let mut others: Vec<_> =
            of_pod.filter(|member| member.peer.id != id).map(|member| (member.epoch(), member.peer.id)).collect();
        others.sort_unstable();
        let too_many = (others.len() + 1).saturating_sub(KEYS_OF_A_POD);
        for (_, other) in others.into_iter().take(too_many) {
            if let Some(banned) =
                self.member(other).map(|member| &member.conduct).filter(|conduct| conduct.is_banned(now))
            {
                // A newer key of the same pod is no way out of a ban.
                let conduct = banned.clone();
                let heir = self.roster.members.entry(id).or_insert_with(|| Member::new(peer.clone()));
                heir.conduct = conduct;
            }
            self.take_down(other, "its pod has newer keys", table);
            self.drop_member(other, table, now);
        }
    }

    /// Up, if nothing speaks against it.
    pub(super) fn judge(&mut self, peer: PeerId, table: &mut Inventory, now: Instant) {
        let me = self.own.peer;
        let Some(member) = self.roster.get_mut(peer) else { return };
        let good = member.is_vouched(now)
            && !member.is_down()
            && !member.accusers.contains(&me)
            && !member.conduct.is_banned(now);
        if good && !member.is_up {
            member.is_up = true;
            table.up(member.peer.clone());
            let output = Output::Up(member.peer.clone());
            self.output(output);
        }
    }

    /// Nothing of it counts from now on.
    pub(super) fn take_down(&mut self, peer: PeerId, reason: &'static str, table: &mut Inventory) {
        let Some(member) = self.roster.get_mut(peer) else { return };
        if std::mem::take(&mut member.is_up) {
            table.hide(peer);
            self.output(Output::Down(peer, reason));
        }
    }

    /// Everything about it is forgotten.
    fn drop_member(&mut self, peer: PeerId, table: &mut Inventory, now: Instant) {
        self.output(Output::Deny(peer));
        self.roster.remove(peer);
        self.behind.remove(&peer);
        self.unknown.remove(&peer);
        let asked: Vec<_> = self.asked.iter().filter(|(_, asked)| asked.of == peer).map(|(ask, _)| *ask).collect();
        for ask in asked {
            if let Some(asked) = self.asked.remove(&ask) {
                self.in_vain(asked.question, now);
            }
        }
        self.chosen_is_stale = true;
        table.forget(peer);
    }

    /// Lets go of those whose credential is over, who are banned, and who have been dead for long.
    pub(super) fn keep_members(&mut self, table: &mut Inventory, now: Instant) {
        let mut ended = Vec::new();
        let mut gone = Vec::new();
        let mut returning = Vec::new();
        let mut doubtful = Vec::new();
        for (peer, member) in &self.roster.members {
            if !member.is_up {
                returning.push(*peer);
            }
            if member.introduction.is_some() && !member.is_vouched(now) {
                ended.push(*peer);
            }
            if matches!(member.life, Life::Doubted(since) if now.duration_since(since) > UNREFUTED)
                && !member.links.any()
            {
                doubtful.push(*peer);
            }
            let dead = matches!(member.life, Life::Down(since) if now.duration_since(since) > RETENTION);
            let nobody = member.introduction.is_none() && !member.is_admitted(now);
            // One that is banned is remembered until the ban is over.
            if (dead || nobody || !may_return(member, now)) && !member.conduct.is_banned(now) {
                gone.push(*peer);
            }
        }
        for peer in ended {
            self.vouch_again(peer, table, now);
        }
        for peer in doubtful {
            self.bury(peer, "has not refuted that it is dead", table, now);
        }
        // A ban may be over.
        for peer in returning {
            self.judge(peer, table, now);
        }
        for peer in gone {
            self.take_down(peer, "forgotten", table);
            self.drop_member(peer, table, now);
        }
    }

    /// What it showed is over. While the means to get anything newer are away, that may be good for longer.
    fn vouch_again(&mut self, peer: PeerId, table: &mut Inventory, now: Instant) {
        let Some(member) = self.roster.get_mut(peer) else { return };
        let Some(introduction) = &member.introduction else { return };
        match self.notary.vouch(peer, &introduction.credential) {
            Ok(vouched) => {
                member.vouched_until = Some(now + vouched.life.min(LONGEST_LIFE));
                member.undecided_since = None;
                return self.judge(peer, table, now);
            }
            // What it takes to decide is being asked for.
            Err(Doubt::CannotTell) if now.duration_since(*member.undecided_since.get_or_insert(now)) < UNDECIDED => {
                member.vouched_until = Some(now + Duration::from_secs(1));
                return;
            }
            Err(_) => member.undecided_since = None,
        }
        let links = member.links.drop_all();
        let was_admitted = member.admitted_until.take().is_some();
        self.outputs.extend(links.into_iter().map(|link| Output::Close(link, peer)));
        if was_admitted {
            self.output(Output::Deny(peer));
        }
        self.take_down(peer, "its credential has expired", table);
    }
}

/// Whether its credential may still be renewed: a member whose agent could not get a new one for a while.
fn may_return(member: &Member, now: Instant) -> bool {
    member.vouched_until.is_none_or(|until| now < until + RETENTION) || member.is_admitted(now)
}
