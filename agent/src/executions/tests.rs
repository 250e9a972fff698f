//! What profiles promise.

use super::*;

const DAY: u64 = 86_400;

fn execution(key: &Key, started_s: u64, memory: f64) -> Execution {
    Execution {
        key: key.clone(),
        started_s,
        duration_s: 60.0,
        cpu_peak: 2.0,
        cpu_mean: 1.0,
        memory_peak: memory,
        disk_peak: 1e6,
        network_peak: 0.0,
    }
}

fn near(value: Option<f64>, expected: f64) -> bool {
    value.is_some_and(|value| (value - expected).abs() <= expected * ERROR * 1.001)
}

fn tags(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn a_program_is_known_by_its_own_size_of_input_then_by_all_then_by_its_tags() {
    let mut catalogue = Catalogue::default();
    let small = Key::new("hash1", &tags(&["etl", "night", "etl"]), Some(1000));
    let large = Key::new("hash1", &tags(&["night", "etl"]), Some(1 << 30));
    assert_eq!((small.size_class, large.size_class, small.tags == large.tags), (Some(10), Some(31), true));
    assert!(catalogue.find(&small).is_none());
    for day in 0..10 {
        catalogue.learn("vm", &execution(&small, day * DAY, 1e8));
        catalogue.learn("vm", &execution(&large, day * DAY + 7200, 1e10));
    }
    let found =
        |key: &Key| catalogue.find(key).map(|(profile, found)| (found, profile.memory_peak.quantile(0.95).unwrap()));
    let (which, memory) = found(&small).unwrap();
    assert!(which == Found::Exact && near(Some(memory), 1e8), "{memory}");
    let other_size = Key::new("hash1", &tags(&["etl", "night"]), Some(1 << 20));
    let (which, memory) = found(&other_size).unwrap();
    assert!(which == Found::Program && near(Some(memory), 1e10), "{memory}");
    let other_program = Key::new("hash2", &tags(&["etl", "night"]), Some(1 << 20));
    assert_eq!(found(&other_program).unwrap().0, Found::Tags);
    assert_eq!(found(&Key::new("hash2", &tags(&["etl"]), None)), None);
    assert_eq!(found(&Key::new("hash2", &[], None)), None);
    let profile = catalogue.find(&small).unwrap().0;
    assert!(near(profile.runs_a_day(), 1.0) && profile.count == 10 && near(profile.duration_s.quantile(0.5), 60.0));
}

#[test]
fn what_a_program_needed_long_ago_fades() {
    let mut catalogue = Catalogue::default();
    let key = Key::new("p", &[], None);
    for n in 0..100 {
        catalogue.learn("vm", &execution(&key, n * 3600, 8e9));
    }
    for n in 0..20 {
        catalogue.learn("vm", &execution(&key, 60 * DAY + n * 3600, 1e9));
    }
    let profile = catalogue.get(&key).unwrap();
    assert!(near(profile.memory_peak.quantile(0.5), 1e9), "{:?}", profile.memory_peak.quantile(0.5));
    // Ten years later only what is new counts, and nothing overflows.
    for n in 0..3 {
        catalogue.learn("vm", &execution(&key, 3650 * DAY + n * 3600, 5e8));
    }
    let profile = catalogue.get(&key).unwrap();
    assert!(near(profile.memory_peak.quantile(1.0), 5e8) && profile.memory_peak.weight() < 4.0);
    // A clock that goes back: old news, told late.
    catalogue.learn("vm", &execution(&key, 0, 9e9));
    assert!(near(catalogue.get(&key).unwrap().memory_peak.quantile(0.99), 5e8));
}

#[test]
fn what_usually_follows_is_counted_and_bounded() {
    let mut catalogue = Catalogue::default();
    let key = |name: &str| Key::new(name, &[], None);
    let mut at_s = 0;
    for n in 0..100 {
        for name in ["extract", "load", &format!("odd{n}")] {
            catalogue.learn("vm", &execution(&key(name), at_s, 1.0));
            at_s += 600;
        }
        // On another machine, and after a long pause: nothing follows.
        catalogue.learn("other", &execution(&key("lonely"), at_s, 1.0));
        at_s += 2 * 3600;
    }
    let followers = &catalogue.get(&key("extract")).unwrap().followers;
    assert_eq!(followers[0], ("load".to_owned(), 100, 0));
    let followers = &catalogue.get(&key("load")).unwrap().followers;
    assert!(
        followers.len() == 8
            && followers.iter().all(|(name, count, excess)| name.starts_with("odd") && count - excess == 1)
    );
    assert_eq!(catalogue.get(&key("lonely")).unwrap().followers, []);
}

#[test]
fn profiles_come_back_as_they_were_and_damage_is_noticed() {
    let mut catalogue = Catalogue::default();
    let key = Key::new("p", &tags(&["t"]), Some(5));
    for n in 0..50u32 {
        catalogue.learn("vm", &execution(&key, u64::from(n) * 1000, f64::from(n) * 1e6));
    }
    let profile = catalogue.get(&key).unwrap();
    let bytes = profile.to_bytes();
    let back = Profile::from_bytes(&bytes).unwrap();
    assert_eq!((back.count, back.last_s, &back.followers), (50, 49_000, &profile.followers));
    for q in [0.05, 0.5, 0.95] {
        assert_eq!(back.memory_peak.quantile(q), profile.memory_peak.quantile(q));
    }
    assert!(bytes.len() < 1000, "{}", bytes.len());
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 4;
        assert_eq!(Profile::from_bytes(&damaged), None, "{at}");
        assert_eq!(Profile::from_bytes(&bytes[..at]), None);
    }
}

#[test]
fn there_are_only_so_many_profiles_and_the_database_is_told() {
    let mut catalogue = Catalogue::default();
    for n in 0..5000 {
        catalogue.learn(&format!("vm{n}"), &execution(&Key::new(&format!("p{n}"), &[], None), n, 1.0));
    }
    assert_eq!(catalogue.iter().count(), 4096);
    let changes = catalogue.changes();
    assert_eq!(changes.iter().filter(|change| matches!(change, Kept::Changed(_))).count(), 4096);
    assert_eq!(changes.len(), 5000);
    assert!(catalogue.changes().is_empty());
}

#[test]
fn an_execution_is_summed_up_from_its_moments() {
    let moment = |at_us, cpu, memory| Moment { at_us, cpu, memory, disk: 10.0, network: 0.5 };
    let moments = [moment(3_000_000, 4.0, 10), moment(1_000_000, 1.0, 30), moment(2_000_000, f64::NAN, 20)];
    let execution = Execution::of(Key::new("p", &[], None), &moments).unwrap();
    assert_eq!((execution.started_s, execution.duration_s, execution.cpu_peak, execution.cpu_mean), (1, 2.0, 4.0, 2.5));
    assert_eq!((execution.memory_peak, execution.disk_peak, execution.network_peak), (30.0, 10.0, 0.5));
    assert_eq!(Execution::of(Key::new("p", &[], None), &[]), None);
}
