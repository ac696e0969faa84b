package image

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"slices"
	"strconv"
	"strings"
)

// dpkgOptions leave out what nobody reads in a container (90 MB of 340). They stay in the image as
// dpkg's configuration, so that an agent's own apt-get install skips it too.
var dpkgOptions = []string{
	"path-exclude=/usr/share/man/*",
	"path-exclude=/usr/share/info/*",
	"path-exclude=/usr/share/locale/*",
	"path-include=/usr/share/locale/locale.alias",
	"path-exclude=/usr/share/doc/*",
	"path-include=/usr/share/doc/*/copyright",
	"path-exclude=/usr/share/lintian/*",
}

// aptOptions stay in the image too: an agent waits for the packages it asked for, not for what
// they recommend, and never for translations.
var aptOptions = []string{
	`Acquire::Languages "none"`,
	`APT::Install-Recommends "false"`,
	`Acquire::Retries "3"`,
}

// dropped is what differs between builds, belongs to the machine that built the image, or is made
// anew by the container's runtime. Folders stay (empty), except in dev.
func dropped(name string, h *tar.Header) bool {
	dir := h.Typeflag == tar.TypeDir
	switch {
	case strings.HasPrefix(name, "dev/"):
		return true
	// apt makes these again. Their owner depends on whether apt's own user could enter the folder
	// that the image was built in.
	case name == "var/cache/apt/archives/partial", name == "var/lib/apt/lists/partial":
		return true
	case dir:
		return false
	case name == "etc/machine-id", name == "etc/hostname", name == "etc/resolv.conf",
		name == "var/lib/dbus/machine-id", name == "var/lib/systemd/random-seed",
		name == "etc/.pwd.lock", strings.HasSuffix(name, "-old") && strings.HasPrefix(name, "var/"):
		return true
	}
	for _, prefix := range []string{
		"var/log/", "var/cache/ldconfig/", "var/cache/apt/", "var/lib/apt/lists/", "tmp/", "run/", "var/tmp/",
	} {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

func baseKey(o BuildOptions) string {
	return cacheKey("base", sources("base.go", "layer.go"), Suite, Packages, dpkgOptions, aptOptions, o.Mirrors, sourceDate.Unix())
}

// buildBase runs mmdebstrap and turns its output into a layer while it arrives.
func buildBase(ctx context.Context, o BuildOptions, tmp, dst string, say func(string)) (*layer, error) {
	args := []string{
		"--mode=root", "--variant=minbase", "--format=tar", "--architectures=amd64",
		"--include=" + strings.Join(Packages, ","),
	}
	for _, opt := range dpkgOptions {
		args = append(args, "--dpkgopt="+opt)
	}
	for _, opt := range aptOptions {
		args = append(args, "--aptopt="+opt)
	}
	args = append(args, Suite, "-")
	args = append(args, o.Mirrors...)

	// The caller's umask and environment must not show in the image; only what apt may need to get
	// out is passed on. TMPDIR is on the cache's disk: /tmp is often a nodev tmpfs, which cannot
	// hold a root file system.
	cmd := exec.CommandContext(ctx, "sh", append([]string{"-c", `umask 022; exec mmdebstrap "$@"`, "mmdebstrap"}, args...)...)
	cmd.Env = []string{
		"TMPDIR=" + tmp, "LC_ALL=C.UTF-8", "TZ=UTC",
		"SOURCE_DATE_EPOCH=" + strconv.FormatInt(sourceDate.Unix(), 10),
	}
	for _, kv := range os.Environ() {
		name, _, _ := strings.Cut(kv, "=")
		if name == "PATH" || name == "HOME" || strings.HasSuffix(strings.ToLower(name), "_proxy") {
			cmd.Env = append(cmd.Env, kv)
		}
	}
	var built *layer
	err := run(cmd, say, func(stdout io.Reader) error {
		var err error
		built, err = writeLayer(dst, func(tw *tar.Writer) error { return filterBase(stdout, tw) })
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("mmdebstrap: %w%s", err, hint(err.Error()))
	}
	return built, nil
}

// hint says what to do about failures that mmdebstrap leaves to the reader.
func hint(said string) string {
	has := func(words ...string) bool {
		return slices.ContainsFunc(words, func(w string) bool { return strings.Contains(said, w) })
	}
	switch {
	case has("NO_PUBKEY", "is not signed", "cannot find debian-archive-keyring"):
		return "\nthis machine lacks Debian's current keys; run: apt-get install -y debian-archive-keyring"
	case has("Could not resolve", "Temporary failure resolving", "Could not connect", "Failed to fetch"):
		return "\nno Debian mirror can be reached; name one with --mirror, or set http_proxy"
	case has("No space left on device"):
		return "\nthe build needs 1.5 GB in the cache folder"
	}
	return ""
}

// filterBase copies mmdebstrap's tar, which is sorted by name, without what dropped names.
func filterBase(r io.Reader, tw *tar.Writer) error {
	tr := tar.NewReader(r)
	kept := 0
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(path.Clean("/"+h.Name), "/")
		if name == "" || dropped(name, h) {
			continue
		}
		h.Name = name
		if h.Typeflag == tar.TypeDir {
			h.Name += "/"
		}
		if h.Typeflag == tar.TypeLink {
			h.Linkname = strings.TrimPrefix(path.Clean("/"+h.Linkname), "/")
		}
		normalise(h)
		if err := tw.WriteHeader(h); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if _, err := io.Copy(tw, tr); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		kept++
	}
	if kept == 0 {
		return errors.New("it wrote no files")
	}
	// What follows the end mark is padding; a full pipe would block the writer.
	_, err := io.Copy(io.Discard, r)
	return err
}
