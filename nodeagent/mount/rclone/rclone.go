// Package rclone mounts with `rclone mount`, for machines without TigrisFS.
//
// What one has to know of it (measured with 1.60, Debian's; all since 1.53 are alike):
//   - There are no modes, owners, symlinks or hard links: every file is 0644 and the
//     session's. Empty folders are forgotten at the next mount.
//   - A file is written to a cache on the node's disk and uploaded a second after it
//     was closed; one that stays open is not. What is not uploaded yet is marked
//     dirty in the cache: that is how Sync knows. (Its remote control is not used:
//     whoever reaches that can read the keys.)
//   - A failed upload is tried again after 2 s, and then twice as long each time, at
//     most 5 min.
//   - A new rclone on the old cache uploads what is dirty: Remount loses what was
//     written in the last moment only (the marks are not written atomically).
package rclone

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudcode-dev/cloudcode/nodeagent/mount"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount/fsop"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount/process"
)

// New returns a Mounter.
func New(cfg process.Config) (*process.Mounter, error) { return process.New(driver{}, cfg) }

type driver struct{}

func (driver) Name() string   { return "rclone" }
func (driver) FSType() string { return "fuse.rclone" }

// CheckArgs says what is wrong with further arguments.
func CheckArgs(args string) error {
	if _, err := flags.Check(args); err != nil {
		return fmt.Errorf("%w: rclone arguments: %w", mount.ErrInvalid, err)
	}
	return nil
}

// flags leaves out where to mount what, the cache, which Sync reads, and all that
// uses files, ports, commands or credentials of the node.
var flags = process.Flags{
	Switches: []string{
		"no-checksum", "no-modtime", "no-seek", "fast-list", "use-server-modtime", "no-check-certificate",
		"s3-disable-checksum", "s3-disable-http2", "s3-force-path-style", "s3-no-check-bucket", "s3-no-head",
		"s3-no-head-object", "s3-requester-pays", "s3-use-accelerate-endpoint", "s3-v2-auth", "vfs-fast-fingerprint",
	},
	Values: []string{
		"attr-timeout", "dir-cache-time", "dir-perms", "file-perms", "umask", "max-read-ahead",
		"vfs-cache-max-age", "vfs-cache-max-size", "vfs-cache-poll-interval", "vfs-read-ahead", "vfs-read-chunk-size",
		"vfs-read-chunk-size-limit", "vfs-read-wait", "vfs-write-wait",
		"buffer-size", "bwlimit", "bwlimit-file", "transfers", "checkers", "tpslimit", "tpslimit-burst",
		"timeout", "contimeout", "retries", "low-level-retries", "user-agent",
		"s3-acl", "s3-chunk-size", "s3-copy-cutoff", "s3-encoding", "s3-list-chunk", "s3-list-version",
		"s3-max-upload-parts", "s3-region", "s3-server-side-encryption", "s3-sse-kms-key-id", "s3-storage-class",
		"s3-upload-concurrency", "s3-upload-cutoff", "s3-use-multipart-etag",
	},
}

var versionLine = regexp.MustCompile(`^rclone (\S+)`)

func (driver) VersionOf(ctx context.Context, program string) (string, error) {
	out, err := exec.CommandContext(ctx, program, "version").Output()
	if err != nil {
		return "", fmt.Errorf("%w: %s version: %w", mount.ErrUnavailable, program, err)
	}
	if v := versionLine.FindSubmatch(out); v != nil {
		return string(v[1]), nil
	}
	return "unknown", nil
}

// remote is the name of the object store in rclone's configuration.
const remote = "CLOUDCODE"

// cacheDir is where files are until they are uploaded.
func cacheDir(given, dir string) string {
	if given != "" {
		return given
	}
	return filepath.Join(dir, "cache")
}

func (driver) Command(s mount.Spec, dir string) (args, env []string, err error) {
	extra, err := flags.Check(s.Args)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: rclone arguments: %w", mount.ErrInvalid, err)
	}
	if _, err := exec.LookPath("fusermount"); err != nil {
		if _, err := exec.LookPath("fusermount3"); err != nil {
			return nil, nil, fmt.Errorf("%w: rclone needs the program fusermount (Debian package fuse3)", mount.ErrUnavailable)
		}
	}
	args = []string{
		"mount", "--config=", // none but the environment
		"--allow-other", "--umask=022",
		"--uid=" + strconv.FormatUint(uint64(s.UID), 10), "--gid=" + strconv.FormatUint(uint64(s.GID), 10),
		"--cache-dir=" + cacheDir(s.CacheDir, dir), "--vfs-cache-mode=writes", "--vfs-write-back=1s",
		// What other programs put into the bucket is seen after so long; rclone's own
		// five minutes look like a file that is lost.
		"--dir-cache-time=10s",
	}
	args = append(args, extra...)
	args = append(args, "--", remote+":"+filepath.Join(s.Bucket, s.Prefix), s.Point)
	set := func(key, value string) { env = append(env, "RCLONE_CONFIG_"+remote+"_"+key+"="+value) }
	set("TYPE", "s3")
	set("PROVIDER", "Other")
	set("ENDPOINT", s.Endpoint)
	set("ACCESS_KEY_ID", s.AccessKeyID)
	set("SECRET_ACCESS_KEY", s.SecretAccessKey)
	set("REGION", process.Region(s))
	set("NO_CHECK_BUCKET", "true") // never makes one
	return args, env, nil
}

// Ready lists the folder: rclone mounts whatever it is given.
func (driver) Ready(ctx context.Context, s mount.Spec, m process.Mounted) error {
	return m.Ask(ctx, func(ctx context.Context) error {
		_, err := fsop.List(ctx, m.Point)
		if errors.Is(err, unix.EIO) {
			return fmt.Errorf("%w: bucket %q at %s cannot be read", mount.ErrFailed, s.Bucket, s.Endpoint)
		}
		return err
	})
}

const syncPause = 100 * time.Millisecond

// Sync implements process.Driver.
func (driver) Sync(ctx context.Context, m process.Mounted) error {
	for {
		left, err := dirty(filepath.Join(cacheDir(m.Cache, m.Dir), "vfsMeta"))
		if err != nil {
			return fmt.Errorf("%w: %w", mount.ErrNotFlushed, err)
		}
		if len(left) == 0 {
			return nil
		}
		t := time.NewTimer(syncPause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			more := ""
			if n := len(left) - 3; n > 0 {
				left, more = left[:3], fmt.Sprintf(" and %d more", n)
			}
			return fmt.Errorf("%w: %q%s are still open or cannot be uploaded (the mounter's log says why): %w", mount.ErrNotFlushed, left, more, ctx.Err())
		}
	}
}

// dirty returns the files of a cache that are not uploaded.
func dirty(meta string) ([]string, error) {
	var left []string
	err := filepath.WalkDir(meta, func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // removed meanwhile, or nothing was ever written
		}
		if err != nil || e.IsDir() {
			return err
		}
		// It is written in place, so it may be half there: then it is not clean either.
		data, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		var item struct{ Dirty *bool }
		if json.Unmarshal(data, &item) != nil || item.Dirty == nil || *item.Dirty {
			rel, err := filepath.Rel(meta, path)
			if err != nil {
				return err
			}
			// <remote>/<bucket>/…
			if parts := strings.SplitN(rel, "/", 3); len(parts) == 3 {
				rel = parts[2]
			}
			left = append(left, rel)
		}
		return nil
	})
	slices.Sort(left)
	return left, err
}

var stamp = regexp.MustCompile(`^\d{4}/\d\d/\d\d \d\d:\d\d:\d\d (?:(?:ERROR|NOTICE|CRITICAL) *: *)?`)

// Words implements process.Driver.
func (driver) Words(line string) string {
	if strings.Contains(line, "Config file ") {
		return ""
	}
	return stamp.ReplaceAllString(line, "")
}
