package containerd

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	ctd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/oci"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
)

// capabilities that root in a container has over its own user namespace:
// enough for apt, npm, git, pip, development servers and headless browsers.
var capabilities = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_SETGID",
	"CAP_SETUID", "CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_SETFCAP",
}

const (
	cpuPeriod = 100_000 // microseconds
	maxSHM    = 1 << 30
	// oomScoreAdj makes the kernel pick a session before the machine's daemons.
	oomScoreAdj = 500
	// softFiles is enough for bundlers that watch a tree, and small enough for
	// programs that close every possible descriptor at start.
	softFiles = 65536
)

// ociSpec says how the container runs. files are the host files to bind over
// those of the image, by their path in the container.
func (r *Runtime) ociSpec(ctx context.Context, s runtime.Spec, img ctd.Image, files map[string]string) (*specs.Spec, error) {
	conf, err := imageConfig(ctx, img)
	if err != nil {
		return nil, err
	}
	args := s.Args
	if len(args) == 0 {
		args = slices.Concat(conf.Entrypoint, conf.Cmd)
	}
	if len(args) == 0 {
		return nil, fmt.Errorf("%w: neither the image %s nor the session says what to run", runtime.ErrInvalidSpec, s.Image)
	}
	uid, gid, err := numericUser(conf.User)
	if err != nil {
		return nil, err
	}
	cwd := s.WorkingDir
	if cwd == "" {
		cwd = conf.WorkingDir
	}
	if cwd == "" {
		cwd = "/"
	}
	hostname := s.Hostname
	if hostname == "" {
		hostname = s.Session
	}
	ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: s.IDBase, Size: runtime.IDMapSize}}

	opts := []oci.SpecOpts{
		oci.WithProcessArgs(args...),
		oci.WithProcessCwd(cwd),
		oci.WithEnv([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOSTNAME=" + hostname}),
		oci.WithEnv(conf.Env),
		oci.WithEnv(environ(s.Env)),
		oci.WithUIDGID(uid, gid),
		oci.WithHostname(hostname),
		oci.WithUserNamespace(ids, ids),
		oci.WithLinuxNamespace(specs.LinuxNamespace{Type: specs.CgroupNamespace}),
		oci.WithCgroup(r.cgroupPath(s.Session)),
		oci.WithNoNewPrivileges,
		oci.WithCapabilities(capabilities),
		// After the capabilities: the profile allows system calls by them.
		seccomp.WithDefaultProfile(),
		func(_ context.Context, _ oci.Client, _ *containers.Container, spec *specs.Spec) error {
			score := oomScoreAdj
			spec.Process.OOMScoreAdj = &score
			spec.Process.Rlimits = []specs.POSIXRlimit{
				{Type: "RLIMIT_NOFILE", Soft: min(softFiles, openFiles()), Hard: openFiles()},
				{Type: "RLIMIT_CORE", Soft: 0, Hard: 0},
			}
			devices := spec.Linux.Resources.Devices
			spec.Linux.Resources = resources(s.Resources, false)
			spec.Linux.Resources.Devices = devices
			spec.Linux.Sysctl = map[string]string{
				// The bridge has no IPv6; without this eth0 would still get a
				// link-local address that no rule of ours covers. ::1 stays.
				"net.ipv6.conf.default.disable_ipv6": "1",
				// ping without CAP_NET_RAW.
				"net.ipv4.ping_group_range": "0 " + strconv.Itoa(runtime.IDMapSize-1),
				// Users inside need no capability to listen on port 80.
				"net.ipv4.ip_unprivileged_port_start": "0",
			}
			mounts(spec, s, files)
			return nil
		},
	}
	return oci.GenerateSpec(ctx, nil, &containers.Container{ID: s.Session}, opts...)
}

func mounts(spec *specs.Spec, s runtime.Spec, files map[string]string) {
	shm := int64(maxSHM)
	if s.Resources.MemoryBytes > 0 {
		shm = min(shm, s.Resources.MemoryBytes/2)
	}
	for i, m := range spec.Mounts {
		if m.Destination == "/dev/shm" {
			spec.Mounts[i].Options = []string{"nosuid", "noexec", "nodev", "mode=1777", "size=" + strconv.FormatInt(shm, 10)}
		}
	}
	if cgroupV2() {
		spec.Mounts = append(spec.Mounts, specs.Mount{
			Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup",
			Options: []string{"ro", "nosuid", "noexec", "nodev"},
		})
	}
	for _, dst := range slices.Sorted(maps.Keys(files)) {
		// Read-only: they are outside the session's disk limit.
		spec.Mounts = append(spec.Mounts, specs.Mount{
			Destination: dst, Type: "bind", Source: files[dst],
			Options: []string{"bind", "rprivate", "ro", "nosuid", "nodev", "noexec"},
		})
	}
	for _, m := range s.Mounts {
		opts := []string{"rbind", "rprivate", "nosuid", "nodev"}
		if m.Propagated {
			opts[1] = "rslave"
		}
		if m.ReadOnly {
			opts = append(opts, "ro")
		}
		spec.Mounts = append(spec.Mounts, specs.Mount{
			Destination: m.Destination, Type: "bind", Source: m.Source, Options: opts,
		})
	}
}

// resources translates limits. For an update "no limit" must be said as -1;
// for a new container it is left out.
func resources(in runtime.Resources, update bool) *specs.LinuxResources {
	out := &specs.LinuxResources{}
	ptr := func(v int64) *int64 { return &v }
	if in.MemoryBytes > 0 || update {
		limit := in.MemoryBytes
		if limit == 0 {
			limit = -1
		}
		out.Memory = &specs.LinuxMemory{Limit: ptr(limit)}
		if swapAccounting() {
			// Memory and swap together: no swap on top of the limit.
			out.Memory.Swap = ptr(limit)
		}
	}
	if in.CPUMillis > 0 || update {
		period, quota, shares := uint64(cpuPeriod), int64(-1), uint64(1024)
		if in.CPUMillis > 0 {
			quota = in.CPUMillis * cpuPeriod / 1000
			shares = uint64(max(2, min(in.CPUMillis*1024/1000, 262144)))
		}
		out.CPU = &specs.LinuxCPU{Period: &period, Quota: &quota, Shares: &shares}
	}
	if in.PIDs > 0 || update {
		limit := in.PIDs
		if limit == 0 {
			limit = -1
		}
		out.Pids = &specs.LinuxPids{Limit: &limit}
	}
	return out
}

// numericUser reads an image's USER. Names would need the image's passwd file.
func numericUser(user string) (uid, gid uint32, err error) {
	if user == "" || user == "root" {
		return 0, 0, nil
	}
	u, g, found := strings.Cut(user, ":")
	uid64, err := strconv.ParseUint(u, 10, 16)
	if err == nil && found {
		var gid64 uint64
		gid64, err = strconv.ParseUint(g, 10, 16)
		gid = uint32(gid64)
	}
	if err != nil {
		return 0, 0, fmt.Errorf("%w: the image runs as user %q; only root and numbers are supported", runtime.ErrInvalidSpec, user)
	}
	return uint32(uid64), gid, nil
}

func imageConfig(ctx context.Context, img ctd.Image) (ocispec.ImageConfig, error) {
	spec, err := img.Spec(ctx)
	if err != nil {
		return ocispec.ImageConfig{}, fmt.Errorf("reading the configuration of image %s: %w", img.Name(), err)
	}
	return spec.Config, nil
}

func environ(env map[string]string) []string {
	out := make([]string, 0, len(env))
	for _, k := range slices.Sorted(maps.Keys(env)) {
		out = append(out, k+"="+env[k])
	}
	return out
}

// writeFiles makes the host files that are bound into the container.
func (r *Runtime) writeFiles(s runtime.Spec) (map[string]string, error) {
	dir := filepath.Join(r.sessionDir(s.Session), "etc")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	resolv, err := resolvConf()
	if err != nil {
		return nil, err
	}
	hostname := s.Hostname
	if hostname == "" {
		hostname = s.Session
	}
	files := map[string]string{}
	for name, content := range map[string]string{
		"resolv.conf": resolv,
		"hostname":    hostname + "\n",
		"hosts":       hostsFile(hostname, ""),
	} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			return nil, err
		}
		if err := os.Lchown(path, int(s.IDBase), int(s.IDBase)); err != nil {
			return nil, err
		}
		files["/etc/"+name] = path
	}
	return files, nil
}

func hostsFile(hostname, ip string) string {
	out := "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
	if ip == "" {
		ip = "127.0.1.1"
	}
	return out + ip + "\t" + hostname + "\n"
}
