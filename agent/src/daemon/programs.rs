//! What is known of programs and events, as the API shows it.

use super::demand::quantiles;
use crate::demand::State;
use crate::demand::profile::{self, Lag, Profile, Subject};
use prestage_integration::api::demand::{ExecutionProfile, Follower, ProfileList, ProfilesQuery, Quantiles, Resource};
use prestage_integration::libvirt::Uuid;

/// A page of profiles.
pub(super) fn profiles(state: &State, query: &ProfilesQuery, now_s: u64) -> ProfileList {
    let catalogue = state.catalogue();
    let (page, more) = catalogue.list(query.program.as_deref(), query.after.as_deref(), query.limit());
    let next = page.last().filter(|_| more).map(|(key, _)| (*key).to_owned());
    let name = |uuid: &String| {
        let machine = Uuid::parse_str(uuid).ok().and_then(|uuid| state.machines.get(&uuid));
        machine.map(|machine| machine.name.clone())
    };
    let shown = page.into_iter().map(|(key, profile)| {
        let shown = shown(key, profile);
        ExecutionProfile {
            followers: catalogue.followers(key, now_s).into_iter().map(follower).collect(),
            event_of_name: shown.event_of.as_ref().and_then(name),
            ..shown
        }
    });
    ProfileList { profiles: shown.collect(), next }
}

/// Quantiles of numbers in order; of few the next greater.
fn of_sorted(numbers: &[u32]) -> Option<Quantiles> {
    let at = |q: f64| {
        let rank = ((q * numbers.len() as f64).ceil() as usize).max(1) - 1;
        numbers.get(rank).copied().map(f64::from)
    };
    Some(Quantiles { p05: at(0.05)?, p50: at(0.5)?, p90: at(0.9)?, p95: at(0.95)? })
}

fn shown(key: &str, profile: &Profile) -> ExecutionProfile {
    let figures = &profile.figures;
    let (program, tags, input, event_of) = match profile::subject(key) {
        Subject::Program { program, tags, class } => (program, tags, class.map(|class| input(&class)), None),
        Subject::Event { name, vm } => (name, Vec::new(), None, Some(vm)),
    };
    let mut durations = figures.durations_s.clone();
    durations.sort_unstable();
    let rise = Resource::ALL.into_iter().zip(&profile.courses);
    let rise = rise.filter_map(|(resource, course)| Some((resource, quantiles(course.expect(0, u32::MAX)?))));
    ExecutionProfile {
        program,
        tags,
        whole: profile::is_whole(key),
        input,
        event_of,
        event_of_name: None,
        starts: figures.starts,
        first_unix_ms: (figures.starts > 0).then(|| figures.first_s.saturating_mul(1000)),
        last_unix_ms: figures.started_s.last().map(|last_s| last_s.saturating_mul(1000)),
        runs_a_day: figures.runs_a_day(),
        by_hour: figures.by_hour.clone(),
        duration_s: of_sorted(&durations),
        known_runs: u32::try_from(profile.runs()).unwrap_or(u32::MAX),
        rise: rise.collect(),
        followers: Vec::new(),
    }
}

/// Class of an input: its least size in bytes.
fn input(class: &str) -> String {
    let bytes = class.parse::<u32>().ok().and_then(|log| 1u64.checked_shl(log));
    bytes.map_or_else(|| "none".to_owned(), |bytes| bytes.to_string())
}

fn follower((follower, of, probability): (profile::Follower, u32, f64)) -> Follower {
    let beside = 2 * follower.lags.iter().filter(|lag| lag.beside).count() > follower.lags.len();
    let mut lags: Vec<u32> = follower.lags.iter().filter(|lag: &&Lag| lag.beside == beside).map(|lag| lag.s).collect();
    lags.sort_unstable();
    Follower {
        seen: follower.count.saturating_sub(follower.excess).min(of),
        program: follower.program,
        of,
        probability,
        after_s: of_sorted(&lags).unwrap_or_default(),
        beside,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_and_quantiles_are_told_in_numbers() {
        assert_eq!((input("20"), input("-"), input("0")), ("1048576".into(), "none".into(), "1".into()));
        let four = Quantiles { p05: 1.0, p50: 2.0, p90: 4.0, p95: 4.0 };
        assert_eq!((of_sorted(&[1, 2, 3, 4]), of_sorted(&[])), (Some(four), None));
    }
}
