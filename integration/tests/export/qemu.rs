//! QEMU as the front-end: its firmware boots a sector from the disk, which reads, writes and prints through it.
//! Needs `qemu-system-x86_64`; runs under TCG anywhere, in a second or two.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use prestage_integration::export::DiskConfig;

use crate::disk::{LIMIT, Served, export_at};

const DISK_BYTES: usize = 1 << 20;
const TEXT: &[u8] = b"prestage: read from sector 7\0";

/// Reads sector 7, prints it to the debug console, writes it to sector 9, and leaves with 33.
#[rustfmt::skip]
const BOOT_SECTOR: &[u8] = &[
    0x31, 0xC0,             // xor ax, ax
    0x8E, 0xD8,             // mov ds, ax
    0x8E, 0xC0,             // mov es, ax
    0xBE, 0x2F, 0x7C,       // mov si, read_packet
    0xB4, 0x42,             // mov ah, 42h
    0xCD, 0x13,             // int 13h               extended read
    0x72, 0x1A,             // jc failed
    0xBE, 0x3F, 0x7C,       // mov si, write_packet
    0xB8, 0x00, 0x43,       // mov ax, 4300h
    0xCD, 0x13,             // int 13h               extended write
    0x72, 0x10,             // jc failed
    0xBE, 0x00, 0x7E,       // mov si, 7e00h
    0xAC,                   // next: lodsb
    0x84, 0xC0,             // test al, al
    0x74, 0x04,             // jz done
    0xE6, 0xE9,             // out 0e9h, al          debug console
    0xEB, 0xF7,             // jmp next
    0xB0, 0x10,             // done: mov al, 10h
    0xEB, 0x02,             // jmp leave
    0xB0, 0x11,             // failed: mov al, 11h
    0xBA, 0xF4, 0x00,       // leave: mov dx, 0f4h
    0xEE,                   // out dx, al            isa-debug-exit: status 2 * al + 1
    // read_packet: 16 bytes, 1 sector, to 0:7e00h, sector 7
    0x10, 0, 1, 0, 0x00, 0x7E, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0,
    // write_packet: the same to sector 9
    0x10, 0, 1, 0, 0x00, 0x7E, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0,
];

fn boot_disk() -> Vec<u8> {
    let mut disk = vec![0; DISK_BYTES];
    disk[..BOOT_SECTOR.len()].copy_from_slice(BOOT_SECTOR);
    disk[510..512].copy_from_slice(&[0x55, 0xAA]);
    disk[7 * 512..][..TEXT.len()].copy_from_slice(TEXT);
    disk
}

/// Ends its process when it goes.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Qemu {
    fn boot(socket: &Path) -> Self {
        let child = Command::new("qemu-system-x86_64")
            .args(["-machine", "q35,accel=tcg,memory-backend=ram", "-nodefaults", "-display", "none"])
            .args(["-object", "memory-backend-memfd,id=ram,size=32M,share=on", "-m", "32M"])
            .arg("-chardev")
            .arg(format!("socket,id=disk,path={},reconnect-ms=200", socket.display()))
            .args(["-device", "vhost-user-blk-pci,chardev=disk,num-queues=2,bootindex=0"])
            .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
            .args(["-chardev", "stdio,id=console", "-device", "isa-debugcon,chardev=console,iobase=0xe9"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-system-x86_64 is installed (package qemu-system-x86)");
        Self(child)
    }

    /// Waits for the guest to leave: its exit status and what it printed.
    fn finish(&mut self) -> (Option<i32>, String) {
        let began = Instant::now();
        let status = loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                break status;
            }
            assert!(began.elapsed() < LIMIT, "the guest does not come to its end");
            std::thread::sleep(Duration::from_millis(20));
        };
        let mut printed = String::new();
        self.0.stdout.take().unwrap().read_to_string(&mut printed).unwrap();
        (status.code(), printed)
    }
}

fn check(served: &Served, qemu: &mut Qemu) {
    let (status, printed) = qemu.finish();
    assert_eq!(status, Some(33), "{printed}");
    assert_eq!(printed.as_bytes(), &TEXT[..TEXT.len() - 1]);
    let disk = served.disk.bytes();
    assert_eq!(disk[9 * 512..10 * 512], disk[7 * 512..8 * 512], "written through");
}

#[test]
fn a_guest_boots_from_the_disk() {
    let served = Served::new(DiskConfig::new(DISK_BYTES as u64), boot_disk());
    let mut qemu = Qemu::boot(&served.path());
    check(&served, &mut qemu);
    served.disk.wait_for(|seen| seen.disconnected > 0 && seen.running.is_empty());
    assert_eq!(served.disk.seen().broken, 0);
}

#[test]
fn a_guest_boots_on_when_the_agent_is_replaced_under_a_request() {
    let mut served = Served::new(DiskConfig::new(DISK_BYTES as u64), boot_disk());
    served.disk.hold.store(true, Ordering::SeqCst);
    let mut qemu = Qemu::boot(&served.path());
    served.disk.wait_for_held(1);
    // The request is taken and never answered, and everything else that this agent knew is gone with it.
    served.export.take().unwrap().stop();
    served.disk.hold.store(false, Ordering::SeqCst);
    served.export = Some(export_at(&served.path(), DiskConfig::new(DISK_BYTES as u64), &served.disk));
    check(&served, &mut qemu);
    assert!(served.disk.seen().resumed > 0);
}
