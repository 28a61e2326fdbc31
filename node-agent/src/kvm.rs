//! Does hardware virtualisation really work here? Decided by running guest instructions, in a child process.
//!
//! A host may offer `/dev/kvm` that opens and creates VMs although guest code is interpreted by an emulated or paravirtual back end: a stock
//! kernel then hangs, or dies with `KVM internal error, suberror 1` at its first `cmpxchg16b`. So nothing but execution counts:
//!
//! ```text
//!  probe() ──spawn──▶ child: long mode, lock cmpxchg16b, counted loop, out ──▶ verdict line on stdout ──▶ Probe
//!     └── no line within PROBE_DEADLINE: kill the child, Unusable(Hangs)
//! ```
//!
//! # Invariants
//!
//! 1. [`probe`] returns within [`PROBE_DEADLINE`] plus a few milliseconds, whatever the kernel does with the child.
//! 2. [`Probe::Works`] means: the loop ran at hardware speed *and* the 16-byte exchange had its effect in guest memory.
//!
//! The binary that calls [`probe`] must hand over to [`child_main`] first thing in `main` when its only argument is [`PROBE_ARG`].

#![expect(unsafe_code, reason = "maps guest memory and hands it to KVM")]

use std::{
    io::{self, Read},
    os::fd::AsFd,
    path::Path,
    process::{Child, Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use serde::{Deserialize, Serialize};

/// The argument that makes the calling binary run [`child_main`].
pub const PROBE_ARG: &str = "kvm-probe";

/// A working KVM needs some 20 ms; a host this slow would not be worth it either.
pub const PROBE_DEADLINE: Duration = Duration::from_secs(3);

/// Rounds of the counted loop: under 1 ms on hardware, about 1.5 s when interpreted (measured on a paravirtual KVM).
const LOOP_ROUNDS: u32 = 1_000_000;

/// A hundred times what hardware needs, so that a busy host is not mistaken for an interpreter.
const LOOP_TIME_MAX: Duration = Duration::from_millis(100);

/// What running guest instructions showed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Probe {
    /// Hardware virtualisation, tried out.
    Works { loop_micros: u64 },
    /// Guests need QEMU's translator: several times slower, and no boundary between tenants (ruling 11).
    Unusable(Unusable),
}

/// Why hardware virtualisation is not used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unusable {
    #[error(
        "/dev/kvm does not exist: the processor or the hypervisor below offers no virtualisation, or the kvm module is not loaded"
    )]
    NoDevice,
    #[error("/dev/kvm cannot be used: {step} failed: {error}")]
    Refused { step: String, error: String },
    #[error("KVM ran {LOOP_ROUNDS} rounds of a loop in {millis} ms: guest code is interpreted, not executed")]
    TooSlow { millis: u64 },
    #[error(
        "KVM stopped at a plain instruction (exit {exit}): guest code is interpreted and the interpreter does not know it"
    )]
    Stopped { exit: String },
    #[error("KVM executed cmpxchg16b wrongly")]
    WrongResult,
    #[error("KVM did not finish a few million instructions within {} s", PROBE_DEADLINE.as_secs())]
    Hangs,
    #[error("the probe process failed: {error}")]
    Probe { error: String },
}

/// Tries KVM out in a copy of the running binary. Takes some 30 ms where KVM works or is absent, [`PROBE_DEADLINE`] at most.
pub fn probe() -> Probe {
    if !Path::new("/dev/kvm").exists() {
        return Probe::Unusable(Unusable::NoDevice);
    }
    let child = Command::new("/proc/self/exe")
        .arg(PROBE_ARG)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    match child {
        Ok(child) => await_verdict(child, PROBE_DEADLINE),
        Err(error) => Probe::Unusable(Unusable::Probe { error: error.to_string() }),
    }
}

/// Reads the child's one line until `deadline`. A child that cannot be killed (stuck inside KVM) is left behind, not waited for.
fn await_verdict(mut child: Child, deadline: Duration) -> Probe {
    let broken = |error: String| Probe::Unusable(Unusable::Probe { error });
    let Some(mut stdout) = child.stdout.take() else { return broken("no pipe to the child".to_owned()) };
    let end = Instant::now() + deadline;
    let mut line = Vec::new();
    loop {
        let left = PollTimeout::try_from(end.saturating_duration_since(Instant::now())).unwrap_or(PollTimeout::ZERO);
        let mut fds = [PollFd::new(stdout.as_fd(), PollFlags::POLLIN)];
        match nix::poll::poll(&mut fds, left) {
            Ok(0) => {
                drop(child.kill());
                drop(child.try_wait());
                return Probe::Unusable(Unusable::Hangs);
            }
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => continue,
            Err(error) => return broken(error.to_string()),
        }
        let mut piece = [0; 512];
        match stdout.read(&mut piece) {
            Ok(0) => break,
            Ok(count) => line.extend_from_slice(&piece[..count]),
            Err(error) => return broken(error.to_string()),
        }
        if line.len() > 4096 {
            return broken("it printed more than one line".to_owned());
        }
    }
    let status = child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
    serde_json::from_slice(&line).unwrap_or_else(|_| broken(format!("{status}, without a verdict")))
}

/// The child's whole life: run the guest, print the verdict.
pub fn child_main() -> ExitCode {
    let verdict = match run_guest() {
        Ok(loop_time) if loop_time > LOOP_TIME_MAX => {
            Probe::Unusable(Unusable::TooSlow { millis: u64::try_from(loop_time.as_millis()).unwrap_or(u64::MAX) })
        }
        Ok(loop_time) => Probe::Works { loop_micros: u64::try_from(loop_time.as_micros()).unwrap_or(u64::MAX) },
        Err(reason) => Probe::Unusable(reason),
    };
    match serde_json::to_writer(io::stdout(), &verdict) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

// Guest-physical layout, one page each.
const PML4: usize = 0x1000;
const PDPT: usize = 0x2000;
const PAGE_DIRECTORY: usize = 0x3000;
const CODE: usize = 0x4000;
const OPERAND: usize = 0x5000;
const MEMORY_BYTES: usize = 0x20_0000;

/// Written to [`RESULT_PORT`] when the exchange matched.
const RESULT_PORT: u16 = 0x10;

/// `lock cmpxchg16b` on [`OPERAND`] (expected 0, new value 0x22:0x11), the counted loop, then the exchange's zero flag to [`RESULT_PORT`].
fn program() -> Vec<u8> {
    let mut code = vec![
        0x48, 0xc7, 0xc7, 0x00, 0x50, 0x00, 0x00, // mov rdi, OPERAND
        0x31, 0xc0, // xor eax, eax
        0x31, 0xd2, // xor edx, edx
        0xbb, 0x11, 0x00, 0x00, 0x00, // mov ebx, 0x11
        0xb9, 0x22, 0x00, 0x00, 0x00, // mov ecx, 0x22
        0xf0, 0x48, 0x0f, 0xc7, 0x0f, // lock cmpxchg16b [rdi]
        0x0f, 0x94, 0xc0, // setz al
        0xb9, // mov ecx, LOOP_ROUNDS
    ];
    code.extend_from_slice(&LOOP_ROUNDS.to_le_bytes());
    code.extend_from_slice(&[
        0x48, 0xff, 0xc9, // again: dec rcx
        0x75, 0xfb, // jnz again
        0xe6, 0x10, // out RESULT_PORT, al
        0xf4, // hlt
    ]);
    code
}

/// Runs [`program`] in long mode and returns how long it took.
fn run_guest() -> Result<Duration, Unusable> {
    let refused = |step: &'static str| {
        move |error: kvm_ioctls::Error| Unusable::Refused { step: step.to_owned(), error: error.to_string() }
    };
    let kvm = Kvm::new().map_err(refused("opening it"))?;
    let vm = kvm.create_vm().map_err(refused("KVM_CREATE_VM"))?;
    let memory =
        GuestMemory::map().map_err(|error| Unusable::Refused { step: "mmap".to_owned(), error: error.to_string() })?;
    let page_flags = 0b11_u64; // present, writable
    memory.write(PML4, &(PDPT as u64 | page_flags).to_le_bytes());
    memory.write(PDPT, &(PAGE_DIRECTORY as u64 | page_flags).to_le_bytes());
    memory.write(PAGE_DIRECTORY, &(page_flags | 1 << 7).to_le_bytes()); // one 2 MiB page over all of it
    memory.write(CODE, &program());
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY_BYTES as u64,
        userspace_addr: memory.start as u64,
    };
    // SAFETY: the region is a live private mapping of exactly this size, unmapped only at the end of this function, after the last run.
    unsafe { vm.set_user_memory_region(region) }.map_err(refused("KVM_SET_USER_MEMORY_REGION"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(refused("KVM_CREATE_VCPU"))?;
    let mut cpuid =
        kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).map_err(refused("KVM_GET_SUPPORTED_CPUID"))?;
    cpuid.as_mut_slice().iter_mut().filter(|entry| entry.function == 1).for_each(|entry| entry.ecx |= 1 << 13); // CMPXCHG16B
    vcpu.set_cpuid2(&cpuid).map_err(refused("KVM_SET_CPUID2"))?;
    enter_long_mode(&vcpu).map_err(refused("setting the registers"))?;

    let start = Instant::now();
    let matched = match vcpu.run() {
        Ok(VcpuExit::IoOut(RESULT_PORT, data)) => data == [1],
        Ok(other) => return Err(Unusable::Stopped { exit: format!("{other:?}") }),
        Err(error) => return Err(refused("KVM_RUN")(error)),
    };
    let took = start.elapsed();
    let mut operand = [0; 16];
    memory.read(OPERAND, &mut operand);
    let expected = 0x22_u128 << 64 | 0x11;
    if matched && u128::from_le_bytes(operand) == expected { Ok(took) } else { Err(Unusable::WrongResult) }
}

/// Flat 64-bit code and data segments, paging on, at the first instruction of [`program`].
fn enter_long_mode(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    let code = kvm_segment {
        limit: 0xffff_ffff,
        selector: 8,
        type_: 11,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..kvm_segment::default()
    };
    let data = kvm_segment { selector: 16, type_: 3, l: 0, db: 1, ..code };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cr3 = PML4 as u64;
    sregs.cr4 |= 1 << 5; // PAE
    sregs.cr0 |= 1 | 1 << 31; // protection, paging
    sregs.efer |= 1 << 8 | 1 << 10; // long mode, enabled and active
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    regs.rip = CODE as u64;
    regs.rflags = 2; // the bit that is always set
    vcpu.set_regs(&regs)
}

/// The probe guest's memory: an anonymous private mapping.
struct GuestMemory {
    start: *mut u8,
}

impl GuestMemory {
    fn map() -> io::Result<Self> {
        // SAFETY: a fresh anonymous mapping; no existing memory is touched.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                MEMORY_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start: start.cast() })
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= MEMORY_BYTES, "the layout constants lie inside the guest's memory");
        // SAFETY: in bounds by the assertion; the guest does not run while we write.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.add(at), bytes.len()) }
    }

    fn read(&self, at: usize, bytes: &mut [u8]) {
        assert!(at + bytes.len() <= MEMORY_BYTES, "the layout constants lie inside the guest's memory");
        // SAFETY: in bounds by the assertion; the guest has stopped.
        unsafe { std::ptr::copy_nonoverlapping(self.start.add(at), bytes.as_mut_ptr(), bytes.len()) }
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: `map` made this mapping with this size, and nothing keeps a pointer into it.
        let _unmapped_or_exiting = unsafe { libc::munmap(self.start.cast(), MEMORY_BYTES) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict_of(script: &str, deadline: Duration) -> Probe {
        let child = Command::new("sh").args(["-c", script]).stdout(Stdio::piped()).spawn().unwrap();
        await_verdict(child, deadline)
    }

    #[test]
    fn a_child_that_hangs_means_tcg_in_time() {
        let start = Instant::now();
        let verdict = verdict_of("exec sleep 60", Duration::from_millis(100));
        assert!(matches!(verdict, Probe::Unusable(Unusable::Hangs)));
        assert!(start.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_child_that_dies_or_babbles_means_tcg() {
        for script in ["kill -9 $$", "echo nonsense", "exit 0", "yes | head -c 100000"] {
            let verdict = verdict_of(script, Duration::from_secs(10));
            assert!(matches!(verdict, Probe::Unusable(Unusable::Probe { .. })), "{script}");
        }
    }

    #[test]
    fn a_working_child_means_kvm() {
        let line = serde_json::to_string(&Probe::Works { loop_micros: 7000 }).unwrap();
        let verdict = verdict_of(&format!("echo '{line}'"), Duration::from_secs(10));
        assert!(matches!(verdict, Probe::Works { loop_micros: 7000 }));
    }
}
