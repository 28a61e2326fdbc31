//! QEMU's command line, as data.
//!
//! The machine is `microvm` with a fixed list of devices (ruling 10): hotplug and a restore across different layouts are not supported, so every
//! VM of a layout has all of them from the start.
//!
//! ```text
//!  virtio-mmio, in this order (an order is a layout):
//!  vol      the sprite's volume, NBD over a unix socket, reconnects for an hour
//!  c0..c4   five read-only disks, empty until a checkpoint is shown on them
//!  net      tap in the sprite's namespace, same MAC for every VM
//!  serial   port 1 `agent` (control channel), port 2 `spare`
//!  rng, balloon
//! ```
//!
//! A snapshot may only be loaded by the QEMU build, machine arguments, CPU model, kernel and layout that made it: [`MachineModel::key`] names them all.

use std::{fmt::Write as _, path::PathBuf};

use proto::record::SizeClass;
use serde::{Deserialize, Serialize};
use serde_json::json;

/// Rises with every change of the device list or its order.
pub const LAYOUT: u32 = 1;
/// Disks on which checkpoints are shown.
pub const CHECKPOINT_DISKS: usize = 5;
/// Name of the volume's NBD export and of its block node.
pub const VOLUME_EXPORT: &str = "vol";
/// A snapshot of one VM is the start of many, so all have the same address; each lives in a namespace of its own.
pub const GUEST_MAC: &str = "52:54:00:5b:1e:01";
/// How long QEMU holds the guest's disk I/O while the NBD server is away (ruling 17).
const RECONNECT_DELAY_S: u32 = 3600;
/// Kernel log of the guest, readable through QMP. A ring, so that a guest cannot fill the host's disk through its console.
const CONSOLE_RING_BYTES: u32 = 65536;

/// How guest code runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Accel {
    /// Hardware virtualisation, with a named CPU model that every host of the cluster has, never `host` (ruling 11).
    Kvm { cpu_model: String },
    /// Software emulation: slower, and no boundary between tenants (ruling 11). The guest's time stamp counter is the host's; its rate, if it is steady.
    Tcg { tsc_khz: Option<u32> },
}

impl Accel {
    /// For people and metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Kvm { .. } => "kvm",
            Self::Tcg { .. } => "tcg",
        }
    }
}

/// What all VMs of one size on this host have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineModel {
    pub accel: Accel,
    pub size: SizeClass,
    /// Version text of the QEMU binary.
    pub qemu_version: String,
    /// Digest of kernel and initramfs.
    pub kernel_digest: String,
}

/// Where one VM's pieces lie. All paths are the same inside and outside the jail.
#[derive(Clone, Debug)]
pub struct VmFiles {
    pub memory: PathBuf,
    pub qmp_socket: PathBuf,
    pub agent_socket: PathBuf,
    pub disk: DiskBackend,
    /// File descriptor of the tap, inherited by QEMU.
    pub tap_fd: i32,
}

/// What stands behind the volume device.
#[derive(Clone, Debug)]
pub enum DiskBackend {
    /// Our block store, over NBD.
    Nbd { socket: PathBuf },
    /// Nothing: the golden VM never opens its disk.
    Null { size_bytes: u64 },
}

/// How the VM begins.
#[derive(Clone, Debug)]
pub enum Start {
    /// Boots the kernel: only to make a golden snapshot.
    Boot { kernel: PathBuf, initrd: PathBuf },
    /// Waits for device state (`migrate-incoming`).
    Incoming,
}

impl MachineModel {
    /// Everything that a snapshot depends on, as a short digest.
    pub fn key(&self) -> String {
        let mut text = String::new();
        write!(
            text,
            "layout {LAYOUT}|{}|{}|{:?}|{}|{}",
            self.qemu_version,
            self.kernel_digest,
            self.accel,
            self.size.as_str(),
            self.kernel_command_line(),
        )
        .expect("writing to a string cannot fail");
        crate::digest::short(text.as_bytes())
    }

    /// What QEMU needs to be alike to load a whole memory, as a short digest: the guest's kernel is in there, so that one of an earlier build goes on.
    pub fn machine_key(&self) -> String {
        let size = self.size.as_str();
        let text = format!("layout {LAYOUT}|{}|{:?}|{size}", self.qemu_version, self.accel);
        crate::digest::short(text.as_bytes())
    }

    /// Few CPUs are quickly asked whether they have passed a grace period of RCU; waiting for it costs 15 ms and more, three times in a freeze of a file
    /// system, and once in moving a process to a control group.
    ///
    /// `tsc_early_khz` and `lpj` keep a busy host from hanging the boot at timer calibration; under KVM they would only be wrong. `tsc=reliable` makes
    /// the counter the guest's clock, which the kernel would not do by itself on two CPUs that do not promise it: it would count ticks, and never stop them.
    pub fn kernel_command_line(&self) -> String {
        let base = "console=ttyS0 panic=-1 quiet random.trust_cpu=on rcupdate.rcu_expedited=1";
        match self.accel {
            Accel::Tcg { tsc_khz: Some(khz) } => {
                format!("{base} no_timer_check lpj=5000000 tsc_early_khz={khz} tsc=reliable")
            }
            Accel::Tcg { tsc_khz: None } => format!("{base} no_timer_check lpj=5000000 tsc_early_khz=2600000"),
            Accel::Kvm { .. } => base.to_owned(),
        }
    }

    /// The arguments behind the program's name.
    pub fn arguments(&self, files: &VmFiles, start: &Start) -> Vec<String> {
        let mut args = self.machine_arguments(files);
        args.extend(disk_arguments(&files.disk));
        args.extend(device_arguments(files));
        match start {
            Start::Boot { kernel, initrd } => {
                push(&mut args, "-kernel", kernel.display());
                push(&mut args, "-initrd", initrd.display());
                push(&mut args, "-append", self.kernel_command_line());
            }
            Start::Incoming => {
                push(&mut args, "-incoming", "defer");
                // It runs when it is told to, not as soon as its state is loaded.
                args.push("-S".into());
            }
        }
        args
    }

    fn machine_arguments(&self, files: &VmFiles) -> Vec<String> {
        let memory_mib = self.size.memory_bytes() >> 20;
        let mut args = Vec::new();
        match &self.accel {
            Accel::Kvm { cpu_model } => {
                push(&mut args, "-accel", "kvm");
                push(&mut args, "-cpu", format!("{cpu_model},enforce"));
            }
            Accel::Tcg { .. } => {
                push(&mut args, "-accel", "tcg,thread=multi");
                push(&mut args, "-cpu", "max");
            }
        }
        push(&mut args, "-M", "microvm,acpi=on,rtc=on,pit=on,pic=on,ioapic2=on,memory-backend=mem");
        push(&mut args, "-m", format!("{memory_mib}M"));
        push(&mut args, "-smp", self.size.vcpus());
        let memory = files.memory.display();
        push(&mut args, "-object", format!("memory-backend-file,id=mem,size={memory_mib}M,mem-path={memory},share=on"));
        for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
            args.push(flag.into());
        }
        push(&mut args, "-display", "none");
        push(&mut args, "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
        push(&mut args, "-chardev", format!("ringbuf,id=console,size={CONSOLE_RING_BYTES}"));
        push(&mut args, "-serial", "chardev:console");
        push(&mut args, "-qmp", format!("unix:{},server=on,wait=off", files.qmp_socket.display()));
        args
    }
}

fn disk_arguments(disk: &DiskBackend) -> Vec<String> {
    let mut args = Vec::new();
    let volume = match disk {
        DiskBackend::Nbd { socket } => json!({
            "driver": "nbd", "node-name": VOLUME_EXPORT, "export": VOLUME_EXPORT,
            "server": { "type": "unix", "path": socket },
            "reconnect-delay": RECONNECT_DELAY_S, "discard": "unmap", "detect-zeroes": "unmap",
        }),
        DiskBackend::Null { size_bytes } => json!({
            "driver": "null-co", "node-name": VOLUME_EXPORT, "size": size_bytes, "read-zeroes": true,
        }),
    };
    push(&mut args, "-blockdev", volume);
    push(&mut args, "-device", format!("virtio-blk-device,drive={VOLUME_EXPORT},discard=on,write-zeroes=on"));
    for disk in 0..CHECKPOINT_DISKS {
        let empty = json!({ "driver": "null-co", "node-name": format!("c{disk}"), "size": 1u64 << 30, "read-zeroes": true, "read-only": true });
        push(&mut args, "-blockdev", empty);
        push(&mut args, "-device", format!("virtio-blk-device,drive=c{disk}"));
    }
    args
}

fn device_arguments(files: &VmFiles) -> Vec<String> {
    let mut args = Vec::new();
    push(&mut args, "-netdev", format!("tap,id=net,fd={}", files.tap_fd));
    push(&mut args, "-device", format!("virtio-net-device,netdev=net,mac={GUEST_MAC}"));
    push(&mut args, "-device", "virtio-serial-device,max_ports=4");
    push(&mut args, "-chardev", format!("socket,id=agent,path={},server=on,wait=off", files.agent_socket.display()));
    push(&mut args, "-device", "virtserialport,chardev=agent,name=agent,nr=1");
    push(&mut args, "-chardev", "null,id=spare");
    push(&mut args, "-device", "virtserialport,chardev=spare,name=spare,nr=2");
    push(&mut args, "-object", "rng-random,filename=/dev/urandom,id=rng");
    push(&mut args, "-device", "virtio-rng-device,rng=rng");
    push(&mut args, "-device", "virtio-balloon-device,free-page-reporting=on");
    args
}

fn push(args: &mut Vec<String>, flag: &str, value: impl ToString) {
    args.push(flag.to_owned());
    args.push(value.to_string());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(accel: Accel) -> MachineModel {
        MachineModel { accel, size: SizeClass::M, qemu_version: "10.0.2".into(), kernel_digest: "abc".into() }
    }

    fn tcg() -> Accel {
        Accel::Tcg { tsc_khz: Some(2_100_000) }
    }

    fn files() -> VmFiles {
        VmFiles {
            memory: "/dev/shm/s/x.mem".into(),
            qmp_socket: "/d/vms/x/qmp.sock".into(),
            agent_socket: "/d/vms/x/agent.sock".into(),
            disk: DiskBackend::Nbd { socket: "/d/vms/x/nbd.sock".into() },
            tap_fd: 7,
        }
    }

    fn value_of<'a>(args: &'a [String], flag: &str) -> &'a str {
        let at = args.iter().position(|arg| arg == flag).unwrap_or_else(|| panic!("{flag} is missing in {args:?}"));
        &args[at + 1]
    }

    #[test]
    fn kvm_uses_a_named_cpu_model_and_no_emulation_workarounds() {
        let machine = machine(Accel::Kvm { cpu_model: "Haswell-noTSX".into() });
        let args = machine.arguments(&files(), &Start::Boot { kernel: "/k".into(), initrd: "/i".into() });
        assert_eq!(value_of(&args, "-accel"), "kvm");
        assert_eq!(value_of(&args, "-cpu"), "Haswell-noTSX,enforce");
        assert!(!value_of(&args, "-append").contains("lpj"));
        assert!(
            !args.iter().any(|arg| arg.contains("host")),
            "the CPU model `host` cannot move between hosts: {args:?}"
        );
    }

    #[test]
    fn tcg_fixes_the_timers() {
        let args = machine(tcg()).arguments(&files(), &Start::Boot { kernel: "/k".into(), initrd: "/i".into() });
        assert_eq!(value_of(&args, "-accel"), "tcg,thread=multi");
        assert!(value_of(&args, "-append").ends_with("tsc_early_khz=2100000 tsc=reliable"));
        let unsteady = machine(Accel::Tcg { tsc_khz: None }).kernel_command_line();
        assert!(unsteady.contains("tsc_early_khz=") && !unsteady.contains("reliable"));
    }

    #[test]
    fn the_disk_waits_an_hour_for_its_server() {
        let args = machine(tcg()).arguments(&files(), &Start::Incoming);
        let disk: serde_json::Value = serde_json::from_str(value_of(&args, "-blockdev")).unwrap();
        assert!(disk["reconnect-delay"].as_u64().unwrap() >= 3600);
        assert_eq!(value_of(&args, "-incoming"), "defer");
    }

    #[test]
    fn every_layout_has_all_devices_in_one_order() {
        let boot = machine(tcg()).arguments(&files(), &Start::Boot { kernel: "/k".into(), initrd: "/i".into() });
        let incoming = machine(tcg()).arguments(&files(), &Start::Incoming);
        let devices = |args: &[String]| -> Vec<String> {
            args.windows(2).filter(|pair| pair[0] == "-device").map(|pair| pair[1].clone()).collect()
        };
        assert_eq!(devices(&boot), devices(&incoming));
        assert_eq!(devices(&boot).len(), 1 + CHECKPOINT_DISKS + 6);
    }

    #[test]
    fn the_key_changes_with_everything_a_snapshot_depends_on() {
        let one = machine(tcg());
        let mut others =
            vec![machine(Accel::Tcg { tsc_khz: None }), machine(Accel::Kvm { cpu_model: "Haswell-noTSX".into() })];
        others.push(MachineModel { qemu_version: "10.0.3".into(), ..one.clone() });
        others.push(MachineModel { kernel_digest: "abd".into(), ..one.clone() });
        others.push(MachineModel { size: SizeClass::L, ..one.clone() });
        for other in others {
            assert_ne!(one.key(), other.key(), "{other:?}");
            let is_other_kernel = other.kernel_digest != one.kernel_digest;
            assert_eq!(one.machine_key() == other.machine_key(), is_other_kernel, "{other:?}");
        }
    }
}
