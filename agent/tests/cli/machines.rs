//! Machines, templates and clones.

use crate::fake::Daemon;
use crate::{fails, prints, run};

#[test]
fn machines_are_listed_attached_and_detached() {
    let daemon = Daemon::start();
    prints(
        &daemon,
        &["vm", "list"],
        "\
VM    STATE     SHARED MEMORY  DISK  BUS     SERVED AS  SOURCE
bare  shut off  no             -
web1  running   yes            vda   virtio  web1-vda   nbd://store:10809/web1
                               sda   sata    -          -
",
    );
    fails(
        &daemon.socket,
        &["vm", "attach", "web1", "vda"],
        1,
        "lacks shared memory backing; use --enable-shared-memory",
    );
    prints(
        &daemon,
        &["vm", "attach", "my vm/é", "vda", "--enable-shared-memory", "--queues", "2"],
        "\
my vm/é vda is served by disk my vm/é-vda from /srv/web1.raw, on /run/prestage/vm/x.sock
It takes effect when the machine is next started; a reboot inside the guest is not enough.
Note: shared memory backing was added to the domain
",
    );
    prints(
        &daemon,
        &["vm", "detach", "web1", "vda"],
        "web1 vda has its source /srv/web1.raw again; disk web1-vda served it\n",
    );
    assert_eq!(
        daemon.control.asked.lock()[1],
        "attach my vm/é vda AttachRequest { enable_shared_memory: true, queues: Some(2), name: None }"
    );
}

#[test]
fn machines_are_saved_as_templates_and_started_from_them() {
    let daemon = Daemon::start();
    prints(
        &daemon,
        &["vm", "save-template", "web1"],
        "web1 is saved in /var/lib/prestage/templates/web1: 180 of 512 MiB in use; it stood for 240 ms\n",
    );
    // The fake forgets the clone at once, as a daemon does one that has ended.
    for wait in [&[][..], &["--wait"]] {
        prints(
            &daemon,
            &[&["vm", "start-from-template", "/srv/t/web1", "--name", "c1"], wait].concat(),
            "\
c1 runs, a clone of /srv/t/web1, after 512 ms
streamed 61 of 181 MiB, 61 of 61 needed first; the rest is being read
Note: its network interfaces are unplugged
",
        );
    }
    fails(&daemon.socket, &["vm", "start-from-template", "web1", "--name", "../c"], 2, "not a name for a machine");
    let list = run(&daemon.socket, &["template", "list"]).out;
    let rows: Vec<_> = list.lines().map(|row| row.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(rows[0], "TEMPLATE OF SAVED MEMORY FIRST CLONES STATE");
    assert_eq!(rows[1], "/srv/t/old - - 0 B 0 B ? DEGRADED: template /srv/t/old is damaged");
    assert!(rows[2].starts_with("web web1 ") && rows[2].ends_with("ago 512 MiB 60 MiB web-2, web-3 ok"), "{list}");
    prints(&daemon, &["template", "remove", "/srv/t/old"], "template /srv/t/old is removed\n");
    assert_eq!(daemon.control.asked.lock().last().unwrap(), "remove template /srv/t/old");
    let asked = daemon.control.asked.lock();
    assert_eq!(asked[0], "save web1 TemplateSave { to: None }");
    assert_eq!(asked[1], "start CloneStart { template: \"/srv/t/web1\", name: \"c1\", verify: false }");
}
