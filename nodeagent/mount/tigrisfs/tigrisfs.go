// Package tigrisfs mounts with TigrisFS.
//
// What one has to know of it (measured at d3e4661; GeeseFS, which it comes from, is
// the same):
//   - A file is uploaded once it is closed, in the background, and the last ones
//     after an unmount. Files that stay open are not.
//   - fsync of the root folder uploads everything, open files too, and reports
//     success whatever comes of it. An upload that failed is tried again after
//     --retry-interval, and an fsync before that returns at once.
//   - Setting the attribute `debug` on a folder prints its state, and that of what
//     is in it, to the log: what waits for upload, and why. That is how Sync knows.
//   - With --uid it gives up root for that user once it has mounted.
//   - On an object store that does not list user metadata (all but Tigris'), modes
//     and symlinks are lost at every mount.
package tigrisfs

import (
	"context"
	"fmt"
	"os/exec"
	"strconv"
	"strings"

	"github.com/cloudcode-dev/cloudcode/nodeagent/mount"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount/process"
)

// New returns a Mounter.
func New(cfg process.Config) (*process.Mounter, error) { return process.New(driver{}, cfg) }

type driver struct{}

func (driver) Name() string   { return "tigrisfs" }
func (driver) FSType() string { return "fuse.tigrisfs" }

// CheckArgs says what is wrong with further arguments (TIGRISFS_ARGS).
func CheckArgs(args string) error {
	if _, err := flags.Check(args); err != nil {
		return fmt.Errorf("%w: TigrisFS arguments: %w", mount.ErrInvalid, err)
	}
	return nil
}

// MaxLogBytes implements process.LogBounder: nothing is written to files but the log,
// and any process of the session can make it print (the attribute `debug`).
func (driver) MaxLogBytes() int64 { return maxLogBytes }

// flags leaves out, among others: where to mount what and as whom, logging and
// --ignore-fsync, which Sync needs as they are; and all that uses files, ports,
// credentials or users of the node; and debugging, which fills the node's disk.
var flags = process.Flags{
	Switches: []string{
		"tigris-prefetch", "tigris-list-content", "cheap", "no-preload-dir", "no-implicit-dir", "no-dir-object",
		"enable-patch", "drop-patch-conflicts", "prefer-patch-uploads", "fsync-on-close",
		"enable-perms", "enable-specials", "no-specials", "enable-mtime", "disable-xattr",
		"requester-pays", "use-content-type", "sse", "no-checksum", "no-detect", "no-expire-multipart", "subdomain", "no-verify-ssl",
	},
	Values: []string{
		"dir-mode", "file-mode",
		"memory-limit", "entry-limit", "gc-interval", "max-flushers", "max-parallel-parts", "max-parallel-copy",
		"read-ahead", "small-read-count", "small-read-cutoff", "read-ahead-small", "large-read-cutoff",
		"read-ahead-large", "read-ahead-parallel", "read-merge", "single-part", "part-sizes", "max-merge-copy",
		"uid-attr", "gid-attr", "mode-attr", "rdev-attr", "mtime-attr", "symlink-attr", "refresh-attr",
		"stat-cache-ttl", "http-timeout", "retry-interval", "read-retry-interval", "read-retry-mul",
		"read-retry-max-interval", "read-retry-attempts",
		"project-id", "region", "storage-class", "cold-min-size", "sse-kms", "list-type", "multipart-age",
		"multipart-copy-threshold", "acl",
		"sdk-max-retries", "sdk-min-retry-delay", "sdk-max-retry-delay", "sdk-min-throttle-delay", "sdk-max-throttle-delay",
	},
	Bounds: map[string]process.Bound{
		"memory-limit": {Min: 50, Max: 4000}, "single-part": {Min: 5, Max: 500}, "max-merge-copy": {Max: 5000}, // MB
		"entry-limit":  {Min: 1000, Max: 1_000_000}, // of 1 KB each
		"gc-interval":  {Min: 50, Max: 100_000},
		"max-flushers": {Min: 1, Max: 64}, "max-parallel-parts": {Min: 1, Max: 64}, "max-parallel-copy": {Min: 1, Max: 64},
		"sdk-max-retries": {Max: 20},
		// KB
		"read-ahead": {Max: 200 << 10}, "read-ahead-small": {Max: 200 << 10}, "read-ahead-large": {Max: 400 << 10},
		"read-ahead-parallel": {Min: 1 << 10, Max: 400 << 10}, "read-merge": {Max: 100 << 10},
		"small-read-count": {Min: 1, Max: 100},
	},
}

func (driver) VersionOf(ctx context.Context, program string) (string, error) {
	out, err := exec.CommandContext(ctx, program, "--version").CombinedOutput()
	if ctx.Err() != nil {
		return "", ctx.Err()
	}
	_, version, ok := strings.Cut(strings.TrimSpace(string(out)), " version ")
	if err != nil || !ok {
		return "unknown", nil // a build without one does not know the flag
	}
	return version, nil
}

func (driver) Command(s mount.Spec, _ string) (args, env []string, err error) {
	extra, err := flags.Check(s.Args)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: TigrisFS arguments: %w", mount.ErrInvalid, err)
	}
	if strings.Contains(s.Prefix, ":") {
		return nil, nil, fmt.Errorf("%w: TigrisFS takes no prefix with a colon: %q", mount.ErrInvalid, s.Prefix)
	}
	args = []string{
		"-f", "--log-format=json", "--print-stats=0", // Sync reads the log
		"--endpoint=" + s.Endpoint,
		"--enable-perms", "--enable-specials",
		"--uid=" + strconv.FormatUint(uint64(s.UID), 10), "--gid=" + strconv.FormatUint(uint64(s.GID), 10),
		"-o", "allow_other",
		// After an outage, 30 s more by default.
		"--retry-interval=5s",
	}
	if r := process.Region(s); r != "" {
		args = append(args, "--region="+r)
	}
	// Paths, not host names, whatever PathStyle says: every server knows them, and
	// that is how TigrisFS is without --subdomain, which may be among the extra ones.
	args = append(args, extra...) // the last of two wins
	bucket := s.Bucket
	if s.Prefix != "" {
		bucket += ":" + s.Prefix
	}
	args = append(args, bucket, s.Point)
	env = []string{"AWS_ACCESS_KEY_ID=" + s.AccessKeyID, "AWS_SECRET_ACCESS_KEY=" + s.SecretAccessKey}
	return args, env, nil
}

// Ready has nothing to do: TigrisFS looks at the bucket before it mounts.
func (driver) Ready(context.Context, mount.Spec, process.Mounted) error { return nil }
