package containerd

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
)

// checkNothingLeft fails the test for every mount, namespace, interface,
// firewall table, process and folder of the test that is still there.
func checkNothingLeft(t testing.TB, e *env, daemonPID int) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, e.dir) || strings.Contains(line, filepath.Dir(e.daemon.Address())) {
			t.Errorf("mount left: %s", line)
		}
	}
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if l.Attrs().Name == e.cfg.BridgeName {
			t.Errorf("bridge left: %s", l.Attrs().Name)
		}
	}
	out, err := exec.Command("nft", "list", "ruleset").Output()
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(out, []byte(e.cfg.BridgeName)) {
		t.Errorf("firewall rules left:\n%s", out)
	}
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range procs {
		data, err := os.ReadFile(p)
		if err == nil && (bytes.Contains(data, []byte(e.dir)) || bytes.Contains(data, []byte("-namespace\x00"+e.cfg.Namespace))) {
			t.Errorf("process left: %s: %s", filepath.Dir(p), bytes.ReplaceAll(data, []byte{0}, []byte{' '}))
		}
	}
	if _, err := os.Stat("/proc/" + strconv.Itoa(daemonPID) + "/root"); err == nil && daemonPID > 0 {
		t.Errorf("containerd %d is still there", daemonPID)
	}
	if _, err := os.Stat(filepath.Dir(e.daemon.Address())); err == nil {
		t.Errorf("run folder left: %s", filepath.Dir(e.daemon.Address()))
	}
	if e.Runtime != nil {
		left, _ := filepath.Glob("/sys/fs/cgroup/*" + e.cgroupParent())
		unified, _ := filepath.Glob("/sys/fs/cgroup" + e.cgroupParent())
		if left = append(left, unified...); len(left) > 0 {
			t.Errorf("cgroups left: %v", left)
		}
	}
	if dirs, _ := filepath.Glob("/run/containerd/runc/" + e.cfg.Namespace); len(dirs) > 0 {
		t.Errorf("runc's state left: %v", dirs)
	}
}
