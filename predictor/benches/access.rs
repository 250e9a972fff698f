//! The hot path by Criterion, an access each, on every load (see [`loads`]). Then the spread over single accesses (p50, p99),
//! which a mean does not show. `cargo bench -p prestage-predictor --bench access`

mod loads;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use loads::{HotPath, Spread};

fn hot_path(c: &mut Criterion) {
    let mut group = c.benchmark_group("observe and predict");
    group.throughput(Throughput::Elements(1));
    for load in loads::all() {
        let mut path = HotPath::warm(&load);
        // Over and over: from the second round on the log knows what comes, and times begin anew.
        let mut next = load.measured().iter().cycle();
        group.bench_function(load.name, |b| b.iter(|| next.next().into_iter().for_each(|access| path.step(access))));
        let Spread { mean, p50, p99 } = Spread::of(&load);
        println!("{}: mean {mean:.0} ns, p50 {p50} ns, p99 {p99} ns, the first time through", load.name);
    }
    group.finish();
}

criterion_group!(benches, hot_path);
criterion_main!(benches);
