use super::*;

#[test]
fn a_policy_out_of_range_is_refused_by_name() {
    let bad = |change: fn(&mut VmPolicy)| {
        let mut policy = VmPolicy::default();
        change(&mut policy);
        policy.validate().unwrap_err()
    };
    assert_eq!(VmPolicy::default().validate(), Ok(()));
    assert!(bad(|policy| policy.priority = 101).contains("priority"));
    assert!(bad(|policy| policy.weight = 0).contains("weight"));
    assert!(bad(|policy| policy.margin = f64::NAN).contains("margin"));
    let memory = |min, max| ResourcePolicy { min, max, ..ResourcePolicy::default() };
    let with = |of: ResourcePolicy| {
        let policy = VmPolicy { resources: [(Resource::Memory, of)].into(), ..VmPolicy::default() };
        policy.validate()
    };
    assert!(with(memory(Some(2.0), Some(1.0))).unwrap_err().contains("memory.min"));
    assert!(with(memory(Some(f64::NEG_INFINITY), None)).unwrap_err().contains("memory.min"));
    assert_eq!(with(memory(Some(1.0), Some(1.0))), Ok(()));
}

#[test]
fn a_policy_is_read_from_little_and_unknown_keys_are_refused() {
    let policy: VmPolicy = serde_json::from_str(r#"{"mode":"act","resources":{"cpu":{"mode":"observe"}}}"#).unwrap();
    assert_eq!((policy.mode_of(Resource::Cpu), policy.mode_of(Resource::Memory)), (Mode::Observe, Mode::Act));
    assert_eq!((policy.priority, policy.weight), (50, 100));
    assert!(serde_json::from_str::<VmPolicy>(r#"{"prioritty":1}"#).is_err());
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let reservation = ReservationRequest { vcpus: 1.0, until_unix_ms: 1, ..ReservationRequest::default() };
    assert_eq!(reservation.validate(), Ok(()));
    assert!(ReservationRequest { vcpus: 0.0, ..reservation.clone() }.validate().is_err());
    assert!(ReservationRequest { vcpus: f64::NAN, ..reservation.clone() }.validate().is_err());
    assert!(ReservationRequest { until_unix_ms: 0, ..reservation }.validate().is_err());
    let event = EventRequest { name: "backup".into(), cron: Some("0 3 * * *".into()), ..EventRequest::default() };
    assert_eq!(event.validate(), Ok(()));
    assert!(EventRequest { at_unix_ms: Some(1), ..event.clone() }.validate().is_err());
    assert!(EventRequest { cron: None, ..event.clone() }.validate().is_err());
    assert!(EventRequest { duration_s: Some(0), ..event }.validate().is_err());
    let start = ExecutionStart { program: "gcc".into(), ..ExecutionStart::default() };
    assert_eq!(start.validate(), Ok(()));
    assert!(ExecutionStart { program: "a\u{1b}[2J".into(), ..start.clone() }.validate().is_err());
    assert!(ExecutionStart { tags: vec!["x".repeat(201)], ..start }.validate().is_err());
}
