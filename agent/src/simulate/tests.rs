//! The simulated host keeps its rules, the reader reads what it says, and a short month comes out the same each time.

use super::host::{Kind, MemoryBy, Pool};
use super::trace::Sample;
use super::*;
use std::io::Write;
use std::path::PathBuf;

const GIB: f64 = 1073741824.0;

fn sample() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/src/simulate/testdata/bitbrains_4vm_1day.csv.gz"))
}

fn read(text: &str) -> Result<Trace, TraceError> {
    let mut file = tempfile::Builder::new().suffix(".csv").tempfile().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    Trace::read(&[file.path().to_owned()])
}

#[test]
fn samples_go_to_the_nearest_step_and_gaps_are_held_and_marked() {
    let trace = read(
        "vm,ts,cores,cpu_pct,mem_cap_kb,mem_kb\n7,1000,2,50,1024,512\n7,1310,2,120,1024,2048\n7,2200,0,0,0,0\n\n12,1000,1,10,1024,1\n",
    )
    .unwrap();
    let names: Vec<&str> = trace.vms.iter().map(|vm| vm.name.as_str()).collect();
    assert_eq!((trace.start_s, trace.steps(), names), (1000, 5, vec!["7", "12"]));
    let on = |cpu, memory, measured| Sample { cores: 2.0, cpu, capacity: 1048576.0, memory, measured };
    let off = Sample { cores: 0.0, cpu: 0.0, capacity: 0.0, memory: 0.0, measured: true };
    let full = 1048576.0;
    assert_eq!(
        trace.vms[0].samples,
        [on(1.0, 524288.0, true), on(2.0, full, true), on(2.0, full, false), on(2.0, full, false), off]
    );
    assert!(!off.on());
}

#[test]
fn the_published_format_is_read_and_mistakes_are_named_with_their_line() {
    let text = "Timestamp [ms];\tCPU cores;\tCPU capacity provisioned [MHZ];\tCPU usage [MHZ];\tCPU usage [%];\t\
        Memory capacity provisioned [KB];\tMemory usage [KB];\n1376314846;\t4;\t1;\t1;\t25;\t2048;\t1024;\n";
    let trace = read(text).unwrap();
    assert_eq!(trace.vms[0].samples[0].cpu, 1.0);
    let header = "ts,vm,cores,cpu_pct,mem_cap_kb,mem_kb\n";
    for (row, expected) in [
        ("1,a,2,x,3,4", "line 2: `x` is no CPU use in %"),
        ("-1,a,2,1,3,4", "line 2: `-1` is no time in seconds"),
        ("1,a,2", "line 2: `` is no"),
    ] {
        let error = read(&format!("{header}{row}\n")).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    assert!(read("a,b\n1,2\n").unwrap_err().to_string().contains("line 1"));
    assert!(read(header).unwrap_err().to_string().contains("has no demand"));
}

#[test]
fn changes_take_the_time_they_were_measured_to_take() {
    let mut cpu = Pool::new(Kind::Cpu, MemoryBy::Balloon, 16.0, 1);
    cpu.demand(0, true, 4.0, 2.0);
    assert!(cpu.ask(0, 8.0) && !cpu.ask(0, 8.0), "the same again is no change");
    cpu.pass(0.5);
    assert_eq!(cpu.shares[0].have, 2.0);
    cpu.pass(0.5);
    assert_eq!((cpu.shares[0].have, cpu.shares[0].short()), (8.0, false));
    cpu.ask(0, 1.0);
    cpu.pass(0.0);
    assert!(cpu.shares[0].short(), "a quota takes effect at once");

    let mut memory = Pool::new(Kind::Memory, MemoryBy::Balloon, 64.0 * GIB, 1);
    memory.demand(0, true, GIB, 2.0 * GIB);
    memory.ask(0, 1.5 * GIB);
    let mut seconds = 0;
    while memory.shares[0].have > 1.5 * GIB {
        memory.pass(1.0);
        seconds += 1;
    }
    assert_eq!(seconds, 6, "512 MiB at 88 MiB/s");
    let mut device = Pool::new(Kind::Memory, MemoryBy::VirtioMem, 64.0 * GIB, 1);
    device.demand(0, true, GIB, 2.0 * GIB);
    device.ask(0, 5.0 * GIB);
    device.pass(1.0);
    assert_eq!((device.shares[0].have / GIB * 100.0).round() / 100.0, 3.67, "512 MiB in 0.3 s");
}

#[test]
fn cpu_is_shared_max_min_and_memory_that_is_given_twice_is_swapped_in() {
    let mut cpu = Pool::new(Kind::Cpu, MemoryBy::Balloon, 6.0, 3);
    for (vm, demand) in [1.0, 4.0, 8.0].into_iter().enumerate() {
        cpu.demand(vm, true, demand, 8.0);
    }
    cpu.pass(0.0);
    let used: Vec<f64> = cpu.shares.iter().map(|share| share.used()).collect();
    assert_eq!(used, [1.0, 2.5, 2.5]);
    assert_eq!(cpu.unused(), 0.0);

    let mut memory = Pool::new(Kind::Memory, MemoryBy::Balloon, 8.0 * GIB, 2);
    memory.demand(0, true, GIB, 8.0 * GIB);
    memory.demand(1, true, GIB, 8.0 * GIB);
    memory.pass(1.0);
    assert!((memory.shares[0].there - 4.0 * GIB).abs() < 1.0 && memory.unused() > 5.9 * GIB);
    memory.demand(0, true, 6.0 * GIB, 8.0 * GIB);
    memory.pass(0.0);
    assert!(memory.shares[0].short());
    let mut seconds = 0;
    while memory.shares[0].short() {
        memory.pass(1.0);
        seconds += 1;
    }
    assert_eq!(seconds, 11, "2 GiB at 200 MiB/s");
    memory.demand(1, true, 7.0 * GIB, 8.0 * GIB);
    (0..600).for_each(|_| memory.pass(1.0));
    let there: Vec<f64> = memory.shares.iter().map(|share| (share.used() / GIB * 100.0).round() / 100.0).collect();
    assert_eq!(there, [4.0, 4.0]);
}

#[test]
fn a_short_month_comes_out_the_same_and_the_planner_beats_what_only_sizes() {
    let trace = Trace::read(&[sample()]).unwrap();
    assert_eq!((trace.vms.len(), trace.steps()), (4, 288));
    let setup = Setup { risks: vec![0.2], host_cores: Some(20.0), host_memory: Some(60.0 * GIB), ..Setup::default() };
    let play = || run(&trace, &setup, &mut |_| {}).unwrap();
    let report = play();
    assert_eq!(report, play());
    assert_eq!(report.rows.len(), 8);
    let row = |name: &str| report.rows.iter().find(|row| row.policy.contains(name)).unwrap();
    let (fixed, vpa, ours) = (row("as provisioned"), row("VPA, p95"), row("risk 0.2"));
    assert_eq!(fixed.score.violation_min, 0.0, "there is enough for all");
    assert!(ours.score.core_hours_unused < 0.7 * fixed.score.core_hours_unused, "{ours:?}");
    assert!(ours.score.violation_min < vpa.score.violation_min, "{ours:?} {vpa:?}");
    // What was wanted was used or missed, whoever decided.
    let wanted = |row: &Row| row.score.core_hours_used + row.score.core_hours_short;
    assert!(report.rows.iter().all(|one| (wanted(one) - wanted(fixed)).abs() < 1e-6 * wanted(fixed)));
    assert!(run(&trace, &Setup { days: 0, ..setup.clone() }, &mut |_| {}).is_err());
}

/// One machine of 32 GiB that uses half a GiB, and from one sample to the next `to` GiB.
fn jump(to: f64, setup: Setup) -> Score {
    let mut text = "vm,ts,cores,cpu_pct,mem_cap_kb,mem_kb\n".to_owned();
    for step in 0..100 {
        let used = if step < 80 { 0.5 } else { to };
        text += &format!("1,{},4,10,{},{}\n", 300_000 + 300 * step, 32 << 20, used * 1048576.0);
    }
    let host_memory = Some(64.0 * GIB);
    let setup = Setup { host_memory, risks: vec![], only: vec!["no forecast".to_owned()], ..setup };
    run(&read(&text).unwrap(), &setup, &mut |_| {}).unwrap().rows[0].score
}

#[test]
fn who_goes_short_as_demand_jumps_is_seen_at_once_and_a_straight_line_is_followed() {
    let seconds = |score: Score| (score.memory_violation_min * 60.0 * score.vm_days).round();
    let held = jump(3.0, Setup::default());
    assert!((3.0..=12.0).contains(&seconds(held)), "{held:?}");
    assert_eq!(held.oom_like, 0, "2 GiB come in time");
    let linear = jump(3.0, Setup { between: Between::Linear, ..Setup::default() });
    assert!(seconds(linear) < 0.5 * seconds(held), "{linear:?}");
}

#[test]
fn a_jump_beyond_what_a_balloon_brings_in_time_is_told_apart() {
    let balloon = jump(12.0, Setup::default());
    assert_eq!((balloon.oom_like, balloon.oom_like_out_of_reach, balloon.oom_like_host_short), (1, 1, 0));
    let device = jump(12.0, Setup { memory_by: MemoryBy::VirtioMem, ..Setup::default() });
    assert_eq!(device.oom_like_out_of_reach, 0, "{device:?}");
    assert!(device.memory_violation_min < balloon.memory_violation_min);
}
