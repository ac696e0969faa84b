//go:build e2e

package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// bridgePrefix begins the name of every bridge of this run: another run on the
// same machine is none of our business.
var bridgePrefix = "cc" + strings.TrimSuffix(idPrefix, "-")

// machine is what of these tests is on this machine, by kind: processes,
// mounts, network interfaces, firewall tables, cgroups, run folders. Other users
// of the machine, other fleets among them, do not show up.
type machine map[string]bool

func machineNow() machine {
	m := machine{}
	add := func(kind, what string) { m[kind+" "+what] = true }

	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range procs {
		cmdline, _ := os.ReadFile(filepath.Join(p, "cmdline"))
		exe, _ := os.Readlink(filepath.Join(p, "exe"))
		text := strings.TrimSpace(strings.ReplaceAll(string(cmdline), "\x00", " "))
		cgroup, _ := os.ReadFile(filepath.Join(p, "cgroup"))
		if ours(text) || ours(exe) || strings.Contains(string(cgroup), "/"+idPrefix) {
			add("process", filepath.Base(p)+" "+text)
		}
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 4 && (ours(line) || slices.ContainsFunc(runDirs(), func(d string) bool { return strings.HasPrefix(f[4], d) })) {
			add("mount", f[4])
		}
	}
	interfaces, _ := net.Interfaces()
	for _, i := range interfaces {
		if strings.HasPrefix(i.Name, bridgePrefix) {
			add("interface", i.Name)
		}
	}
	for _, list := range [][]string{{"nft", "list", "ruleset"}, {"iptables-save"}} {
		out, _ := exec.Command(list[0], list[1:]...).Output()
		for line := range strings.Lines(string(out)) {
			if strings.Contains(line, bridgePrefix) {
				add("firewall rule", strings.TrimSpace(line))
			}
		}
	}
	for _, d := range fleetRunDirs {
		for _, parent := range []string{"/sys/fs/cgroup/*", "/sys/fs/cgroup"} {
			found, _ := filepath.Glob(parent + cgroupParent(d))
			for _, f := range found {
				add("cgroup", f)
			}
		}
	}
	for _, d := range runDirs() {
		add("run folder", d)
	}
	return m
}

// cgroupParent is the cgroup of all containers of a private containerd, by the
// folder of its socket.
func cgroupParent(runDir string) string {
	sum := sha256.Sum256([]byte(filepath.Join(runDir, "containerd.sock")))
	return "/cloudcode-" + hex.EncodeToString(sum[:4])
}

// ours recognises text that names this run's folder.
func ours(s string) bool { return work.dir != "" && strings.Contains(s, work.dir) }

// runDirs are the folders below /run of private containerds of this run.
func runDirs() []string {
	var out []string
	found, _ := filepath.Glob("/run/cloudcode/*")
	for _, d := range found {
		for _, known := range fleetRunDirs {
			if d == known {
				out = append(out, d)
			}
		}
	}
	return out
}

// since says what is here now and was not before.
func (m machine) since(before machine) error {
	var errs []error
	for _, what := range slices.Sorted(maps.Keys(m)) {
		if !before[what] {
			errs = append(errs, fmt.Errorf("left behind: %s", what))
		}
	}
	return errors.Join(errs...)
}
