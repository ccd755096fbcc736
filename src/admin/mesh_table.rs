//! A [`MeshStatus`] as text: a summary of a few lines, and a table of 80 to 120 columns with a line
//! for each member.

use std::collections::BTreeMap;

use crate::model::{MemberState, MemberStatus, MeshStatus};

/// Zones and releases that a summary line names. A cluster has three to five zones and one or two
/// releases.
const MAX_NAMED: usize = 8;

/// Widest columns. Names of nodes differ at the beginning or at the end, so the middle is left out.
const MAX_NODE: usize = 28;
const MAX_ZONE: usize = 16;
const MAX_RELEASE: usize = 12;

const HEADER: [&str; 8] = ["NODE", "ZONE", "RELEASE", "ADDRESS", "STATE", "NEIGHBOR", "ITEMS", "BEHIND"];

/// From this column on, cells are numbers and align to the right.
const NUMBERS: usize = 6;

/// The state of the mesh in a few lines.
pub fn mesh_summary(status: &MeshStatus) -> Vec<String> {
    let MeshStatus { alive, suspected, down, banned, neighbors, items, inventory_blobs, inventory_bytes, .. } = status;
    let living = || status.members.iter().filter(|member| member.state != MemberState::Down);
    let zones = counts(living().map(|member| member.zone.as_deref()).chain([status.zone.as_deref()]));
    let releases = counts(living().map(|member| Some(&*member.release)).chain([Some(&*status.release)]));
    let behind: Vec<_> = status.members.iter().map(|member| member.behind).filter(|behind| *behind > 0).collect();
    let lag = match behind.iter().max() {
        None => "none".to_owned(),
        Some(max) => format!("behind {} members, by {max} announcements at most", behind.len()),
    };
    vec![
        format!("{alive} alive, {suspected} suspected, {down} down, {banned} banned; {neighbors} neighbors"),
        format!("zones: {zones}"),
        format!("releases: {releases}"),
        format!(
            "inventory: {inventory_blobs} blobs of peers, {:.1} MiB; this node announces {items} items",
            *inventory_bytes as f64 / f64::from(1 << 20)
        ),
        format!("lag: {lag}"),
    ]
}

/// A line for each other member, under a header.
pub fn mesh_table(status: &MeshStatus) -> String {
    let rows: Vec<_> = status.members.iter().map(row).collect();
    let widths: Vec<_> = (0..HEADER.len())
        .map(|column| {
            let longest = rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
            longest.max(HEADER[column].len())
        })
        .collect();
    let line = |cells: &[String; 8]| {
        let cell = |(column, text): (usize, &String)| {
            let width = widths[column];
            if column < NUMBERS { format!("{text:width$}") } else { format!("{text:>width$}") }
        };
        cells.iter().enumerate().map(cell).collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    let mut text = line(&HEADER.map(str::to_owned));
    rows.iter().for_each(|row| text += &line(row));
    let total = status.alive + status.suspected + status.down;
    if total > status.members.len() {
        text += &format!("and {} more\n", total - status.members.len());
    }
    text
}

fn row(member: &MemberStatus) -> [String; 8] {
    let MemberStatus {
        node,
        peer_id: _,
        zone,
        release,
        address,
        state,
        neighbor,
        items,
        sequence: _,
        behind,
        banned_s,
    } = member;
    let state = match (banned_s, state) {
        (Some(seconds), _) => format!("banned {seconds} s"),
        (None, MemberState::Alive) => "alive".into(),
        (None, MemberState::Suspected) => "suspected".into(),
        (None, MemberState::Down) => "down".into(),
    };
    [
        shorten(node, MAX_NODE),
        zone.as_deref().map_or_else(|| "-".into(), |zone| shorten(zone, MAX_ZONE)),
        shorten(release, MAX_RELEASE),
        address.clone(),
        state,
        if *neighbor { "yes" } else { "-" }.into(),
        items.to_string(),
        behind.to_string(),
    ]
}

/// Lists names by frequency, the most frequent first: `a 3, b 2, none 1`.
fn counts<'a>(names: impl Iterator<Item = Option<&'a str>>) -> String {
    let mut counted: BTreeMap<&str, usize> = BTreeMap::new();
    names.for_each(|name| *counted.entry(name.unwrap_or("none")).or_default() += 1);
    let mut counted: Vec<_> = counted.into_iter().collect();
    counted.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let named: Vec<_> = counted.iter().take(MAX_NAMED).map(|(name, count)| format!("{name} {count}")).collect();
    let more = counted.len().saturating_sub(MAX_NAMED);
    if more > 0 { format!("{} and {more} more", named.join(", ")) } else { named.join(", ") }
}

/// Shortens a text to `most` characters, by leaving out the middle.
fn shorten(text: &str, limit: usize) -> String {
    let characters: Vec<char> = text.chars().collect();
    if characters.len() <= limit {
        return text.to_owned();
    }
    let (head, tail) = (limit / 2, limit - limit / 2 - 1);
    let parts = [&characters[..head], &['…'], &characters[characters.len() - tail..]];
    parts.concat().into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(node: &str, zone: Option<&str>, state: MemberState) -> MemberStatus {
        MemberStatus {
            node: node.into(),
            zone: zone.map(Into::into),
            release: "0.1.0".into(),
            address: "10.0.0.12:4701".into(),
            state,
            items: 1520,
            ..MemberStatus::default()
        }
    }

    fn mesh() -> MeshStatus {
        MeshStatus {
            node: "n1".into(),
            release: "0.2.0".into(),
            zone: Some("eu-1a".into()),
            items: 1490,
            alive: 2,
            suspected: 1,
            down: 1,
            banned: 1,
            neighbors: 1,
            inventory_blobs: 19_873,
            inventory_bytes: 12 << 20,
            members: vec![
                MemberStatus { neighbor: true, ..member("n2", Some("eu-1b"), MemberState::Alive) },
                MemberStatus {
                    behind: 3,
                    ..member("ip-10-0-3-12.eu-central-1.compute.internal", Some("eu-1b"), MemberState::Suspected)
                },
                MemberStatus { banned_s: Some(40), ..member("n4", None, MemberState::Alive) },
                member("n5", Some("eu-1c"), MemberState::Down),
            ],
            ..MeshStatus::default()
        }
    }

    #[test]
    fn the_summary_counts_members_zones_releases_and_lag() {
        let expected = [
            "2 alive, 1 suspected, 1 down, 1 banned; 1 neighbors",
            "zones: eu-1b 2, eu-1a 1, none 1",
            "releases: 0.1.0 3, 0.2.0 1",
            "inventory: 19873 blobs of peers, 12.0 MiB; this node announces 1490 items",
            "lag: behind 1 members, by 3 announcements at most",
        ];
        assert_eq!(mesh_summary(&mesh()), expected);
        assert_eq!(mesh_summary(&MeshStatus::default())[4], "lag: none");
    }

    #[test]
    fn every_member_has_a_line() {
        let expected = "\
NODE                          ZONE   RELEASE  ADDRESS         STATE        NEIGHBOR  ITEMS  BEHIND
n2                            eu-1b  0.1.0    10.0.0.12:4701  alive        yes        1520       0
ip-10-0-3-12.e…pute.internal  eu-1b  0.1.0    10.0.0.12:4701  suspected    -          1520       3
n4                            -      0.1.0    10.0.0.12:4701  banned 40 s  -          1520       0
n5                            eu-1c  0.1.0    10.0.0.12:4701  down         -          1520       0
";
        assert_eq!(mesh_table(&mesh()), expected);
    }

    #[test]
    fn a_table_of_usual_names_fits_a_terminal() {
        let long = MemberStatus {
            release: "0.10.0-rc.1+build.20260101".into(),
            address: "192.168.100.200:14701".into(),
            items: 65_536,
            behind: 100_000,
            ..member(&"n".repeat(253), Some(&"z".repeat(63)), MemberState::Suspected)
        };
        let widest = MeshStatus { alive: 1, members: vec![long], ..MeshStatus::default() };
        assert!(mesh_table(&widest).lines().all(|line| line.chars().count() <= 120), "{}", mesh_table(&widest));
        let usual =
            MeshStatus { members: vec![member("node-10", Some("eu-central-1a"), MemberState::Alive)], ..mesh() };
        assert!(mesh_table(&usual).lines().all(|line| line.len() <= 85), "{}", mesh_table(&usual));
        assert!(mesh_table(&usual).ends_with("and 3 more\n"), "members beyond the table are counted");
    }
}
