package containerd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const ifName = "eth0"

// network connects containers by CNI. Each gets a veth pair to one bridge on
// which ports are isolated from one another.
//
// Masquerading is one static table of ours instead of the bridge plugin's rules
// per container: those cost time at each start and stop, and leak when a daemon
// dies in between. Nor is its macspoofchk used: 20 ms and rules in a table that
// all programs of the machine share, named by the session's id only, against
// what a container without CAP_NET_RAW and CAP_NET_ADMIN cannot do anyway.
type network struct {
	bridge   string
	subnet   netip.Prefix
	table    string // nftables table, inet family
	ipamDir  string
	cacheDir string
	cni      *libcni.CNIConfig
	conf     *libcni.NetworkConfigList
}

func newNetwork(ctx context.Context, cfg Config, subnet netip.Prefix) (*network, error) {
	n := &network{
		bridge:   cfg.BridgeName,
		subnet:   subnet,
		table:    "cloudcode_" + cfg.BridgeName,
		ipamDir:  filepath.Join(cfg.StateDir, "cni", "ipam"),
		cacheDir: filepath.Join(cfg.StateDir, "cni", "cache"),
	}
	if err := n.checkSubnet(); err != nil {
		return nil, err
	}
	conf, err := json.Marshal(map[string]any{
		"cniVersion": "1.0.0",
		"name":       n.table,
		"plugins": []any{map[string]any{
			"type":          "bridge",
			"bridge":        n.bridge,
			"isGateway":     true,
			"portIsolation": true,
			"ipam": map[string]any{
				"type":    "host-local",
				"dataDir": n.ipamDir,
				"ranges":  [][]any{{map[string]any{"subnet": subnet.String()}}},
				"routes":  []any{map[string]any{"dst": "0.0.0.0/0"}},
			},
		}},
	})
	if err != nil {
		return nil, err
	}
	if n.conf, err = libcni.ConfListFromBytes(conf); err != nil {
		return nil, err
	}
	n.cni = libcni.NewCNIConfigWithCacheDir([]string{cfg.CNIBinDir}, n.cacheDir, &invoke.DefaultExec{
		RawExec:       &invoke.RawExec{Stderr: io.Discard}, // errors come on stdout
		PluginDecoder: version.PluginDecoder{},
	})
	return n, n.makeTable(ctx)
}

// checkSubnet refuses a range that the machine already routes elsewhere, and
// removes an idle bridge of ours that has another range from an earlier run.
func (n *network) checkSubnet() error {
	own := -1
	link, err := netlink.LinkByName(n.bridge)
	if err == nil {
		own = link.Attrs().Index
		if err := n.checkBridge(link); err != nil {
			return err
		}
	}
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("listing routes: %w", err)
	}
	for _, rt := range routes {
		if rt.Dst == nil || rt.LinkIndex == own {
			continue
		}
		ones, _ := rt.Dst.Mask.Size()
		addr, ok := netip.AddrFromSlice(rt.Dst.IP.To4())
		if ok && ones > 0 && netip.PrefixFrom(addr, ones).Overlaps(n.subnet) {
			return fmt.Errorf("subnet %s for containers overlaps the route to %s of this machine; choose another one", n.subnet, rt.Dst)
		}
	}
	return nil
}

func (n *network) checkBridge(link netlink.Link) error {
	if _, ok := link.(*netlink.Bridge); !ok {
		return fmt.Errorf("%s is a network interface of this machine, but no bridge; choose another bridge name", n.bridge)
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("listing addresses of %s: %w", n.bridge, err)
	}
	for _, a := range addrs {
		addr, _ := netip.AddrFromSlice(a.IP.To4())
		ones, _ := a.Mask.Size()
		if netip.PrefixFrom(addr, ones).Masked() == n.subnet {
			continue
		}
		idle, err := n.idle(link)
		if err != nil {
			return err
		}
		if !idle {
			return fmt.Errorf("bridge %s has address %s, but containers are to have %s; stop them first, or choose another bridge name", n.bridge, a.IPNet, n.subnet)
		}
		if err := netlink.LinkDel(link); err != nil {
			return fmt.Errorf("removing bridge %s: %w", n.bridge, err)
		}
		return nil
	}
	return nil
}

// idle says whether nothing hangs on the bridge.
func (n *network) idle(bridge netlink.Link) (bool, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return false, fmt.Errorf("listing interfaces: %w", err)
	}
	for _, l := range links {
		if l.Attrs().MasterIndex == bridge.Attrs().Index {
			return false, nil
		}
	}
	return true, nil
}

// makeTable replaces our firewall table in one transaction.
func (n *network) makeTable(ctx context.Context) error {
	return nft(ctx, fmt.Sprintf(`
table inet %[1]s
delete table inet %[1]s
table inet %[1]s {
	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr %[3]s ip daddr != %[3]s oifname != %[2]q masquerade
	}
	chain forward {
		type filter hook forward priority filter; policy accept;
		iifname %[2]q oifname %[2]q drop
		iifname %[2]q ip saddr != %[3]s drop
		iifname %[2]q ip daddr 169.254.0.0/16 reject comment "cloud metadata services"
		iifname != %[2]q oifname %[2]q ct state new drop comment "nothing reaches a container from outside"
	}
}
`, n.table, n.bridge, n.subnet))
}

func (n *network) deleteTable(ctx context.Context) error {
	return nft(ctx, fmt.Sprintf("table inet %[1]s\ndelete table inet %[1]s\n", n.table))
}

func nft(ctx context.Context, script string) error {
	cmd := exec.CommandContext(ctx, "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(script)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		if errors.Is(err, exec.ErrNotFound) {
			return fmt.Errorf("the program nft is missing (Debian package nftables): %w", err)
		}
		return fmt.Errorf("nft: %w: %s", err, strings.TrimSpace(stderr.String()))
	}
	return nil
}

// add connects the pinned network namespace and returns the container's address.
func (n *network) add(ctx context.Context, id, netns string) (string, error) {
	res, err := n.cni.AddNetworkList(ctx, n.conf, &libcni.RuntimeConf{ContainerID: id, NetNS: netns, IfName: ifName})
	if err != nil {
		var cniErr *types.Error
		if errors.As(err, &cniErr) && strings.Contains(err.Error(), "no IP addresses available") {
			return "", fmt.Errorf("the subnet %s has no address left: %w", n.subnet, err)
		}
		return "", fmt.Errorf("connecting the network: %w", err)
	}
	r, err := types100.GetResult(res)
	if err != nil {
		return "", err
	}
	for _, ip := range r.IPs {
		return ip.Address.IP.String(), nil
	}
	return "", errors.New("connecting the network: CNI gave no address")
}

// del is idempotent. netns may be gone or not a namespace.
func (n *network) del(ctx context.Context, id, netns string) error {
	if !isNetns(netns) {
		netns = "" // frees the address; the interface went with its namespace
	}
	err := n.cni.DelNetworkList(ctx, n.conf, &libcni.RuntimeConf{ContainerID: id, NetNS: netns, IfName: ifName})
	if err != nil {
		return fmt.Errorf("disconnecting the network: %w", err)
	}
	return nil
}

// allocated lists the containers that hold an address.
func (n *network) allocated() ([]string, error) {
	dir := filepath.Join(n.ipamDir, n.conf.Name)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, e := range entries {
		if net.ParseIP(e.Name()) == nil {
			continue // lock and last_reserved_ip
		}
		data, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, err
		}
		id, _, _ := strings.Cut(strings.TrimSpace(string(data)), "\r\n")
		ids = append(ids, id)
	}
	return ids, nil
}

// isNetns says whether path is a pinned network namespace other than our own:
// deleting "eth0" there would be deleting the machine's.
func isNetns(path string) bool {
	var fs unix.Statfs_t
	if unix.Statfs(path, &fs) != nil || fs.Type != unix.NSFS_MAGIC {
		return false
	}
	var pinned, own unix.Stat_t
	return unix.Stat(path, &pinned) == nil && unix.Stat("/proc/self/ns/net", &own) == nil && pinned.Ino != own.Ino
}

// pinNetns keeps the network namespace of a process at path.
func pinNetns(pid uint32, path string) error {
	if err := unpinNetns(path); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_ = f.Close()
	src := fmt.Sprintf("/proc/%d/ns/net", pid)
	if err := unix.Mount(src, path, "", unix.MS_BIND, ""); err != nil {
		_ = os.Remove(path)
		return fmt.Errorf("pinning the network namespace: %w", err)
	}
	return nil
}

// unpinNetns is idempotent.
func unpinNetns(path string) error {
	err := unix.Unmount(path, unix.MNT_DETACH)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unpinning %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Cleanup removes bridge, firewall table, CNI state and cgroups. It refuses, with an
// error that names one, while there is a container.
func (r *Runtime) Cleanup(ctx context.Context) error {
	list, err := r.List(ctx)
	if err != nil {
		return err
	}
	if len(list) > 0 {
		return fmt.Errorf("cannot clean up: session %s still has a container", list[0].Session)
	}
	if link, err := netlink.LinkByName(r.cfg.BridgeName); err == nil {
		if err := netlink.LinkDel(link); err != nil {
			return fmt.Errorf("removing bridge %s: %w", r.cfg.BridgeName, err)
		}
	}
	if err := r.net.deleteTable(ctx); err != nil {
		return err
	}
	return errors.Join(
		r.removeCgroups(),
		os.RemoveAll(filepath.Join(r.cfg.StateDir, "cni")),
		os.RemoveAll(netnsDir(r.cfg.StateDir)),
		os.RemoveAll(sessionsDir(r.cfg.StateDir)),
	)
}
