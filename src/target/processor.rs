//! Which of a processor's features a container's programs can use.
//!
//! Two kernels on one processor do not print the same list: what the kernel made of it, what only it can use and what it
//! does against its bugs are in there too. A feature on this list may be missing at the target.

use crate::wire::message::CpuFlag;

/// Features that no instruction of a program depends on (arch/x86/include/asm/cpufeatures.h): made up by Linux, or of use
/// to a kernel or hypervisor only. A feature that is not listed counts as a program's. `la57` is listed although a program may
/// map memory above 2^47 where it is: hardly any asks for that, and half of all moves would be refused.
const KERNELS_OWN: &str = "
    acc_power always amd_dcm amd_lbr_v2 aperfmperf arch_lbr arch_perfmon art bts centaur_hauls constant_tsc cpuid
    extd_apicid k6_mtrr k7 k8 nonstop_tsc nonstop_tsc_s3 nopl pebs rapl rep_good syscall32 sysenter32 tsc_known_freq
    tsc_reliable up xtopology zen zen5 zen6
    cdp_l2 cdp_l3 cat_l2 cat_l3 cpb cpuid_fault epb hw_pstate kernel_ibrs ls_cfg_ssbd mba msr_spec_ctrl perfmon_v2
    proc_feedback pti rsb_ctxsw rsb_vmexit use_ibpb use_ibrs_fw
    amd_ppin arch_capabilities bus_lock_detect clear_cpu_buf core_capability entry_ibpb flush_l1d ibpb ibrs ibrs_enhanced
    ibpb_exit_to_user md_clear retpoline rrsba_ctrl split_lock_detect ssbd srbds_ctrl stibp virt_ssbd
    fence_swapgs_kernel fence_swapgs_user per_thread_mba cqm cqm_llc cqm_mbm_local cqm_mbm_total cqm_occup_llc rdt_a
    acpi apic cid cmp_legacy ibt cr8_legacy cppc dca de ds_cpl dtes64 dts est ht hypervisor ia64 ibs invpcid la57 mca mce monitor
    msr mtrr nx pae pbe pcid pconfig pdcm pdpe1gb perfctr_core perfctr_llc perfctr_nb bpext pge ptsc pse pse36 skinit smap
    smep smx ss succor smca overflow_recov tm tm2 topoext tsc_adjust tsc_deadline_timer vme wdt x2apic xsaves xtpr extapic
    intel_pt irperf
    arat dtherm hfi hw_protection hwp hwp_act_window hwp_epp hwp_notify hwp_pkg_req ida pln pts
    ept ept_ad flexpriority sgx_lc tdx_guest tpr_shadow vcpupreempt vmmcall vmx vnmi vpid xenpv
    avic debug_swap decodeassists flushbyasid lbrv npt nrip_save pausefilter pfthreshold sev sev_es sev_snp sme svm svm_lock
    tsc_scale v_spec_ctrl v_vmsave_vmload vgif vmcb_clean x2avic
";

/// Whether a program that was started where this feature is may fail where it is not.
pub fn a_program_may_need(flag: &CpuFlag) -> bool {
    !KERNELS_OWN
        .split_whitespace()
        .any(|own| own == flag.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_instructions_need_counts_and_what_kernels_need_does_not() {
        let needed = |flag: &str| a_program_may_need(&flag.to_string().try_into().unwrap());
        for flag in [
            "avx512f",
            "sse4_2",
            "xsave",
            "rdrand",
            "fsgsbase",
            "pku",
            "user_shstk",
            "asimd",
            "not_yet_known",
        ] {
            assert!(needed(flag), "{flag}");
        }
        for flag in ["xtopology", "smep", "vmx", "ibpb", "constant_tsc"] {
            assert!(!needed(flag), "{flag}");
        }
    }
}
